package http1

// ParseError is why a message was refused. All values are shared and constant, so that a hostile peer costs no
// allocation; compare with errors.Is or ==.
type ParseError struct {
	// Status is what a server answers (400, 426, 431, 501); a client treats any as a broken upstream (502).
	Status int
	// Detail is Envoy's response code detail, e.g. "http1.codec_error": the one that Envoy 1.40 gives for the same input.
	Detail string
	// Reason says what is wrong, for logs.
	Reason string
}

// Error implements error.
func (e *ParseError) Error() string { return e.Detail + ": " + e.Reason }

func bad(detail, reason string) *ParseError { return &ParseError{400, detail, reason} }

// What can be wrong with a message.
var (
	ErrMethod          = bad("http1.codec_error", "invalid method")
	ErrTarget          = bad("http1.invalid_url", "invalid request target")
	ErrFragment        = bad("path_normalization_failed", "fragment in the request target")
	ErrScheme          = bad("http1.invalid_scheme", "request target with a scheme other than http and https")
	ErrAbsoluteForm    = bad("http1.invalid_url", "request target in absolute form is not allowed here")
	ErrVersion         = bad("http1.codec_error", "invalid HTTP version")
	ErrStatusLine      = bad("http1.codec_error", "invalid status line")
	ErrStartLine       = bad("http1.codec_error", "invalid request line")
	ErrFieldName       = bad("http1.codec_error", "invalid character in a field name")
	ErrFieldValue      = bad("http1.invalid_characters", "invalid character in a field value")
	ErrFolded          = bad("http1.codec_error", "folded field line")
	ErrBareCR          = bad("http1.codec_error", "CR without LF")
	ErrBareLF          = bad("http1.codec_error", "LF without CR")
	ErrContentLength   = bad("http1.codec_error", "invalid content-length")
	ErrDuplicateLength = bad("http1.codec_error", "more than one content-length")
	ErrLengthAndTE     = bad("http1.content_length_and_chunked_not_allowed", "content-length beside transfer-encoding")
	ErrLengthForbidden = bad("http1.content_length_not_allowed", "content-length where none is allowed")
	ErrTEForbidden     = bad("http1.transfer_encoding_not_allowed", "transfer-encoding where none is allowed")
	ErrHost            = bad("http.invalid_authority", "invalid host")
	ErrDuplicateHost   = bad("http1.codec_error", "more than one host")
	ErrMissingHost     = bad("missing_host_header", "no host in an HTTP/1.1 request")
	ErrUnderscore      = bad("http1.unexpected_underscore", "underscore in a field name")
	ErrConnection      = bad("http1.connection_header_rejected", "connection nominates a field that must stay")
	ErrChunkSize       = bad("http1.codec_error", "invalid chunk size")
	ErrChunkExtension  = bad("http1.codec_error", "invalid chunk extension")
	ErrChunkEnd        = bad("http1.codec_error", "chunk data not followed by CRLF")
	ErrChunkTooLong    = bad("http1.codec_error", "chunk-size line or chunk extensions too long")
	ErrTrailer         = bad("http1.codec_error", "field not allowed in trailers")
	ErrUnexpectedEOF   = bad("http1.codec_error", "connection closed in the middle of a message")
	ErrUpgrade         = bad("http1.codec_error", "101 that was not asked for")
	ErrInterim         = bad("http1.codec_error", "too many informational responses")
	ErrUnexpectedData  = bad("http1.codec_error", "data where no message was expected")

	ErrTransferEncoding = &ParseError{501, "http1.invalid_transfer_encoding", "transfer-encoding other than chunked"}
	ErrHTTP10           = &ParseError{426, "low_version", "HTTP/1.0 is not accepted"}
	ErrHeadTooLarge     = &ParseError{431, "http1.headers_too_large", "head too large"}
	ErrTooManyFields    = &ParseError{431, "http1.too_many_headers", "too many fields"}
)
