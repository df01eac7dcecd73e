package http1

// ruling is what we do where llhttp says otherwise.
type ruling uint8

const (
	refuse      ruling = iota // llhttp accepts
	refuseLater               // as soon as the head is complete
	accept                    // llhttp refuses, or was told something that we are not
)

type difference struct {
	we     ruling
	reason string
	cases  []string
}

// differences are llhttp's cases that we judge in another way on purpose, and why. The test fails for a case that
// differs and is not here, and for one that is here and does not differ.
var differences = []difference{
	{refuse, "lenient mode of llhttp, not offered: what is no line end must not be one for us only", []string{
		"request/content-length: Missing CRLF-CRLF before body (lenient)",
		"request/invalid: Headers separated by dummy characters (lenient)",
		"request/invalid: Only LFs present (lenient)",
		"request/lenient-headers: Empty headers separated by CR (lenient)",
		"request/sample: No LF after CR (lenient)",
		"request/transfer-encoding: Chunk header not terminated by CRLF (lenient)",
		"request/transfer-encoding: Chunk data not terminated by CRLF (lenient)",
		"response/invalid: Bare CR after response line (lenient)",
		"response/invalid: Only LFs present and no body (lenient)",
		"response/invalid: Only LFs present (lenient)",
		"response/sample: No carriage ret (lenient)",
	}},
	{refuse, "lenient mode of llhttp, not offered: white space before the colon, folded lines and control characters are read in different ways by different servers", []string{
		"request/connection: Multiple tokens with folding",
		"request/connection: Multiple tokens with folding, LWS, and CRLF",
		"request/connection: Invalid whitespace token with `Connection` header field (lenient)",
		"request/content-length: Invalid whitespace token with `Content-Length` header field (lenient)",
		"request/invalid: Spaces before headers (lenient)",
		"request/lenient-header-value-relaxed: Control char in header value (relaxed)",
		"request/lenient-headers: Header value (lenient)",
		"request/lenient-headers: Second request header value (lenient)",
		"request/sample: Line folding in header value with CRLF",
		"request/sample: X-SSL-Nonsense",
	}},
	{refuse, "lenient mode of llhttp, not offered: framing that two recipients can disagree about", []string{
		"request/content-length: No error on simultaneous `Content-Length` and `Transfer-Encoding: identity` (lenient)",
		"request/transfer-encoding: POST with `Transfer-Encoding` and `Content-Length` (lenient)",
		"request/transfer-encoding: POST with `chunked` before other transfer-coding (lenient)",
		"request/transfer-encoding: POST with `chunked` and duplicate transfer-encoding (lenient)",
		"request/transfer-encoding: Space after chunk header (lenient)",
	}},
	{refuse, "lenient mode of llhttp, not offered: after a message with close nothing more is read (RFC 9112 section 9.6)", []string{
		"request/connection: Resetting flags when keep-alive is off (1.0, lenient)",
		"request/connection: CRLF between requests, explicit `close` (lenient)",
		"response/connection: HTTP/1.1 with keep-alive disabled, content-length (lenient)",
		"response/connection: HTTP/1.1 with keep-alive disabled and 204 status (lenient)",
	}},
	{refuse, "lenient mode of llhttp, not offered: only HTTP/1.0 and HTTP/1.1 are read here", []string{
		"request/lenient-version: Invalid HTTP version (lenient)",
		"response/lenient-version: Invalid HTTP version (lenient)",
	}},
	{refuse, "not HTTP/1.0 or HTTP/1.1: RTSP, ICE and HTTP/0.9 are not proxied", []string{
		"request/method: SOURCE request with ICE",
		"request/method: OPTIONS request with RTSP",
		"request/method: ANNOUNCE request with RTSP",
		"request/sample: No HTTP version",
		"response/sample: RTSP response",
		"response/sample: ICE response",
		"response/sample: HTTP version 0.9",
	}},
	{refuse, "HTTP/2's preface is looked for before the HTTP/1 parser is asked, and only where HTTP/2 is spoken", []string{
		"request/method: PRI request HTTP2",
	}},
	{accept, "methods are an open set (RFC 9110 section 16.1): any token is passed on, the server decides", []string{
		"request/invalid: Invalid method",
		"request/invalid: HTTP protocol and ANNOUNCE method",
	}},
	{refuse, "RFC 9112 section 3.2.4: the asterisk form is for OPTIONS only; M-SEARCH belongs to SSDP over UDP", []string{
		"request/method: M-SEARCH request",
	}},
	{refuse, "RFC 9112 section 3.2: a request target has no fragment; Envoy refuses it too", []string{
		"request/uri: Fragment in URI",
		"url: Absolute URL",
		"url: Relative URL",
		"url: URL fragment",
		"url: Complex URL fragment",
		"url: Complex URL from node.js url parser doc",
	}},
	{refuse, "RFC 9110 section 4.2.4: user information in an http URI is to be treated as an error", []string{
		"request/uri: `host:port` and basic auth",
		"url: Complex URL with basic auth from node.js url parser doc",
		"url: Proxy basic auth with url encoded space",
		"url: Proxy basic auth with unreserved chars",
	}},
	{refuse, "a CONNECT with content: the bytes could be taken for the body or for the tunnel's first", []string{
		"request/method: CONNECT with body",
	}},
	{refuse, "RFC 9112 section 6.1: 101 has no body, and fields that announce one could be believed by somebody", []string{
		"response/connection: HTTP 101 response with Upgrade and Content-Length header",
		"response/connection: HTTP 101 response with Upgrade and Transfer-Encoding header",
	}},
	{refuse, "transfer codings other than chunked alone would have to be decoded before the message can be framed anew; Envoy refuses them too (501)", []string{
		"request/transfer-encoding: POST with `chunked` as last transfer-encoding",
		"request/transfer-encoding: POST with `chunked` as last transfer-encoding (multiple headers)",
		"response/transfer-encoding: `chunked` before other transfer-encoding",
		"response/transfer-encoding: multiple transfer-encoding where chunked is not the last one",
		"response/transfer-encoding: `chunkedchunked` transfer-encoding does not enable chunked enconding",
		"response/transfer-encoding: Invalid OBS fold after chunked value",
	}},
	{refuse, "a server that sends blank lines between responses has lost count of its bodies; the forgiveness of RFC 9112 section 2.2 is for requests", []string{
		"response/connection: HTTP 304 with Content-Length",
		"response/connection: HTTP 100 first, then 400",
		"response/pipelining: Should parse multiple events",
		"response/sample: Response starting with CRLF",
	}},
	{refuseLater, "the same verdict, only when the head is complete, which it is not in this input", []string{
		"request/content-length: Error on `Content-Length` overflow",
		"request/content-length: Error on duplicate `Content-Length`",
	}},
	{accept, "here llhttp's test tells the parser to skip the body; ours reads it", []string{
		"request/content-length: Content-Length reset when no body is received",
		"response/content-length: Content-Length reset when no body is received",
	}},
}

var disagreements = func() map[string]difference {
	m := map[string]difference{}
	for _, d := range differences {
		for _, name := range d.cases {
			m[name] = d
		}
	}
	return m
}()
