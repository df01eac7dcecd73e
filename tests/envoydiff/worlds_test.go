package envoydiff

import "strings"

func repeat(s string, n int) string { return strings.Repeat(s, n) }

func get(path, extra string) []string {
	return []string{"GET " + path + " HTTP/1.1|Host: a.example|" + extra + "|"}
}

var worlds = []world{
	{name: "plain", exchanges: []exchange{
		{name: "get", send: get("/", "")},
		{name: "keep-alive then close", send: []string{"GET /1 HTTP/1.1|Host: a||", "GET /2 HTTP/1.1|Host: a|Connection: close||"}, requests: 2},
		{name: "pipelined", send: []string{"GET /1 HTTP/1.1|Host: a|x-do: chunked||GET /2 HTTP/1.1|Host: a||GET /3 HTTP/1.1|Host: a||"}, requests: 3},
		{name: "head", send: []string{"HEAD / HTTP/1.1|Host: a|x-do: raw HTTP/1.1 200 OK^content-length: 10^^||"}, ignore: []string{"x-do"}},
		{name: "post", send: []string{"POST / HTTP/1.1|Host: a|Content-Length: 5||hello"}},
		{name: "post empty", send: []string{"POST / HTTP/1.1|Host: a||"}},
		{name: "put empty with length", send: []string{"PUT / HTTP/1.1|Host: a|Content-Length: 0||"}},
		{name: "options empty", send: []string{"OPTIONS /x HTTP/1.1|Host: a||"}},
		{name: "options asterisk", send: []string{"OPTIONS * HTTP/1.1|Host: a||"}},
		{name: "delete", send: []string{"DELETE / HTTP/1.1|Host: a||"}},
		{name: "own method", send: []string{"PURGE / HTTP/1.1|Host: a||"}},
		{name: "get with body", send: []string{"GET / HTTP/1.1|Host: a|Content-Length: 3||abc"}},
		{name: "chunked request", send: []string{"POST / HTTP/1.1|Host: a|Transfer-Encoding: chunked||3|abc|2|de|0||"}},
		{name: "request trailers", send: []string{"POST / HTTP/1.1|Host: a|Transfer-Encoding: chunked||3|abc|0|x-t: 1||"}, differs: "Envoy drops HTTP/1 trailers unless told otherwise; we pass them on"},
		{name: "chunked response", send: get("/", "x-do: chunked|")},
		{name: "response trailers", send: get("/", "x-do: trailers|"), differs: "Envoy drops HTTP/1 trailers unless told otherwise; we pass them on"},
		{name: "204", send: get("/", "x-do: nobody 204|")},
		{name: "304", send: get("/", "x-do: nobody 304|")},
		{name: "200 of no length", send: get("/", "x-do: rawclose HTTP/1.1 200 OK^|")},
		{name: "absolute form", send: []string{"GET http://b.example/p?q=1 HTTP/1.1|Host: a||"}},
		{name: "hop by hop", send: get("/", "Connection: keep-alive, x-drop|X-Drop: 1|X-Keep: 2|Keep-Alive: timeout=5|Proxy-Connection: close|TE: trailers, deflate|Trailer: x|")},
		{name: "expect continue", send: []string{"POST / HTTP/1.1|Host: a|Content-Length: 2|Expect: 100-continue||", "hi"}},
		{name: "forwarded for", send: get("/", "X-Forwarded-For: 1.2.3.4, 5.6.7.8|X-Forwarded-Proto: https|X-Request-Id: mine|")},
		{name: "envoy headers", send: get("/", "X-Envoy-Retry-On: 5xx|X-Envoy-Max-Retries: 3|X-Envoy-Upstream-Rq-Timeout-Ms: 5|X-Envoy-Internal: true|X-Envoy-Expected-Rq-Timeout-Ms: 3|X-Envoy-Decorator-Operation: x|X-Envoy-Original-Path: /y|")},
		{name: "forwarded for, private", send: get("/", "X-Forwarded-For: 10.1.2.3|X-Envoy-Retry-On: 5xx|")},
		{name: "referer", send: get("/", "Referer: not a url|")},
		{name: "good referer", send: get("/", "Referer: https://x.example/y?z|")},
		{name: "via and server", send: get("/", "x-do: headers server: mine^via: 1.1 x^date: yesterday^connection: keep-alive, x-drop^x-drop: 1^keep-alive: timeout=3|"), differs: "Envoy forwards what a response's Connection field nominates; RFC 9110 section 7.6.1 says not to"},
		{name: "upstream closes", send: get("/", "x-do: close|"), skip: []string{"upstream"}},
		{name: "upstream resets", send: get("/", "x-do: reset|"), skip: []string{"upstream"}},
		{name: "upstream garbage", send: get("/", "x-do: rawclose garbage|")},
		{name: "upstream cut", send: get("/", "x-do: rawclose HTTP/1.1 200 OK^content-length: 10^^abc|"), skip: []string{"end"}},
		{name: "upstream 500", send: get("/", "x-do: status 500|")},
		{name: "upgrade not allowed", send: get("/", "Connection: upgrade|Upgrade: websocket|")},
		{name: "h2c", send: get("/", "Connection: Upgrade, HTTP2-Settings|Upgrade: h2c|HTTP2-Settings: AAA|")},
		{name: "no host", send: []string{"GET / HTTP/1.1||"}},
		{name: "two hosts", send: []string{"GET / HTTP/1.1|Host: a|Host: b||"}, differs: "Envoy joins the two; RFC 9112 section 3.2 demands 400"},
		{name: "http 1.0", send: []string{"GET / HTTP/1.0|Host: a||"}},
		{name: "garbage", send: []string{"hello there||"}, skip: []string{"details"}},
		{name: "length and chunked", send: []string{"POST / HTTP/1.1|Host: a|Content-Length: 3|Transfer-Encoding: chunked||0||"}},
		{name: "two lengths", send: []string{"POST / HTTP/1.1|Host: a|Content-Length: 3|Content-Length: 4||abc"}},
		{name: "unknown coding", send: []string{"POST / HTTP/1.1|Host: a|Transfer-Encoding: gzip||abc"}},
		{name: "bad chunk", send: []string{"POST / HTTP/1.1|Host: a|Transfer-Encoding: chunked||zz|abc|0||"}, differs: "Envoy has begun to send the request; here head and error came together, so nothing is sent"},
		{name: "relative path", send: []string{"GET foo HTTP/1.1|Host: a||"}, skip: []string{"details"}},
		{name: "fragment", send: get("/a#b", ""), differs: "the codec refuses it already, with the status text as body"},
		{name: "connect", send: []string{"CONNECT a:80 HTTP/1.1|Host: a:80||"}},
		{name: "client leaves", send: get("/", "x-do: hang|"), half: true},
		{name: "early response", send: []string{"POST / HTTP/1.1|Host: a|x-do: early|Content-Length: 50||abc"}},
		{name: "nominates forwarded", send: get("/", "Connection: close, x-forwarded-for|X-Forwarded-For: 1.1.1.1|")},
		{name: "cookies", send: get("/", "Cookie: a=1|Cookie: b=2|")},
		{name: "repeated", send: get("/", "X-A: 1|X-B: 2|X-A: 3|")},
	}},
}

// routes is a virtual host for everything.
func routes(r string) string { return "- name: all\n  domains: [\"*\"]\n  routes:\n" + indent(r, 2) }

func init() {
	worlds = append(worlds, world{name: "edge", hcm: `
use_remote_address: true
server_name: gate
via: gate
always_set_request_id_in_response: true
normalize_path: true
merge_slashes: true
path_with_escaped_slashes_action: UNESCAPE_AND_REDIRECT
strip_any_host_port: true
common_http_protocol_options: {headers_with_underscores_action: DROP_HEADER}
`, exchanges: []exchange{
		{name: "get", send: get("/", "")},
		{name: "with forwarded for", send: get("/", "X-Forwarded-For: 1.2.3.4|X-Forwarded-Proto: https|X-Request-Id: mine|X-Envoy-External-Address: 9.9.9.9|")},
		{name: "envoy headers", send: get("/", "X-Envoy-Retry-On: 5xx|X-Envoy-Max-Retries: 3|X-Envoy-Upstream-Rq-Timeout-Ms: 5|X-Envoy-Internal: true|X-Envoy-Decorator-Operation: x|X-Envoy-Original-Path: /y|X-Envoy-Force-Trace: 1|X-Envoy-Ip-Tags: x|X-Envoy-Downstream-Service-Cluster: c|X-Envoy-Downstream-Service-Node: n|")},
		{name: "dots", send: get("/a/./b/../c", "")},
		{name: "dots at the end", send: get("/a/b/..", "")},
		{name: "dots above the root", send: get("/../../a", "")},
		{name: "escaped dots", send: get("/a/%2e%2E/b", "")},
		{name: "escaped letters", send: get("/%41%7e%20%3a%zz", "")},
		{name: "odd characters", send: []string{"GET /a;b=c,d HTTP/1.1|Host: a||"}},
		{name: "quote and braces", send: get("/a\"<>`{}^[]'", "")},
		{name: "backslash", send: get("/a\\b", "")},
		{name: "slashes", send: get("//a///b//?x=//y", "")},
		{name: "slashes and dots", send: get("/a//../b", "")},
		{name: "escaped slash", send: get("/a%2Fb?q=%2f", "")},
		{name: "escaped backslash", send: get("/a%5Cb", "")},
		{name: "escaped null", send: get("/a%00b", "")},
		{name: "port in host", send: []string{"GET / HTTP/1.1|Host: a.example:8080||"}},
		{name: "v6 host", send: []string{"GET / HTTP/1.1|Host: [::1]:8080||"}},
		{name: "underscore", send: get("/", "a_b: 1|c-d: 2|")},
	}}, world{name: "trusted hops", hcm: `
use_remote_address: true
xff_num_trusted_hops: 1
skip_xff_append: true
preserve_external_request_id: true
server_header_transformation: APPEND_IF_ABSENT
normalize_path: true
path_with_escaped_slashes_action: REJECT_REQUEST
strip_matching_host_port: true
common_http_protocol_options: {headers_with_underscores_action: REJECT_REQUEST, max_requests_per_connection: 2}
`, exchanges: []exchange{
		{name: "get", send: get("/", "")},
		{name: "forwarded", send: get("/", "X-Forwarded-For: 1.2.3.4, 10.0.0.1|X-Forwarded-Proto: https|X-Request-Id: mine|")},
		{name: "server there", send: get("/", "x-do: headers server: mine|")},
		{name: "escaped slash", send: get("/a%2Fb", "")},
		{name: "underscore", send: get("/", "a_b: 1|")},
		{name: "two requests", send: []string{"GET /1 HTTP/1.1|Host: a||", "GET /2 HTTP/1.1|Host: a||"}, requests: 2},
	}}, world{name: "http 1.0", hcm: `
http_protocol_options: {accept_http_10: true, default_host_for_http_10: standard}
`, exchanges: []exchange{
		{name: "get", send: []string{"GET / HTTP/1.0||"}},
		{name: "keep-alive", send: []string{"GET / HTTP/1.0|Connection: keep-alive||", "GET / HTTP/1.0|Host: b||"}, requests: 2},
		{name: "chunked response", send: []string{"GET / HTTP/1.0|x-do: chunked||"}},
		{name: "chunked response, keep-alive", send: []string{"GET / HTTP/1.0|Connection: keep-alive|x-do: chunked||"}},
	}}, world{name: "routes", hosts: `
- name: tls
  domains: [tls.example]
  require_tls: ALL
  routes: [{match: {prefix: /}, route: {cluster: u}}]
- name: strict
  domains: [strict.example, "strict.example:8080"]
  include_request_attempt_count: true
  include_attempt_count_in_response: true
  response_headers_to_add: [{header: {key: x-host, value: strict}}]
  routes:
  - {match: {path: /only}, route: {cluster: u}}
- name: all
  domains: ["*"]
  routes:
  - {match: {prefix: /direct}, direct_response: {status: 202, body: {inline_string: "done\n"}}, response_headers_to_add: [{header: {key: x-d, value: "1"}}]}
  - {match: {prefix: /silent}, direct_response: {status: 204}}
  - {match: {prefix: /typed}, direct_response: {status: 200, body: {inline_string: "{}"}}, response_headers_to_add: [{header: {key: content-type, value: application/json}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}]}
  - {match: {prefix: /r/host}, redirect: {host_redirect: new.example}}
  - {match: {prefix: /r/path}, redirect: {path_redirect: "/p", response_code: FOUND}}
  - {match: {prefix: /r/query}, redirect: {path_redirect: "/p?own=1", response_code: SEE_OTHER}}
  - {match: {prefix: /r/strip}, redirect: {https_redirect: true, strip_query: true, response_code: TEMPORARY_REDIRECT}}
  - {match: {prefix: /r/https}, redirect: {https_redirect: true, response_code: PERMANENT_REDIRECT}}
  - {match: {prefix: /r/port}, redirect: {scheme_redirect: ftp, port_redirect: 2121}}
  - {match: {prefix: /r/prefix}, redirect: {prefix_rewrite: /q}}
  - {match: {prefix: /r/regex}, redirect: {regex_rewrite: {pattern: {regex: "/r/regex/(.*)"}, substitution: "/\\1/x"}}}
  - {match: {prefix: /w/prefix}, route: {cluster: u, prefix_rewrite: /}}
  - {match: {prefix: /w/slash/}, route: {cluster: u, prefix_rewrite: /new/}}
  - {match: {path: /w/path}, route: {cluster: u, prefix_rewrite: /exact}}
  - {match: {path_separated_prefix: /w/sep}, route: {cluster: u, prefix_rewrite: /s}}
  - {match: {safe_regex: {regex: "/w/re/.*"}}, route: {cluster: u, regex_rewrite: {pattern: {regex: "^/w/re/([^/]+)(/.*)$"}, substitution: "\\2/\\1"}}}
  - {match: {safe_regex: {regex: "/w/rp/.*"}}, route: {cluster: u, prefix_rewrite: /whole}}
  - {match: {prefix: /h/literal}, route: {cluster: u, host_rewrite_literal: lit.example}}
  - {match: {prefix: /h/xfh}, route: {cluster: u, host_rewrite_literal: lit.example, append_x_forwarded_host: true}}
  - {match: {prefix: /h/header}, route: {cluster: u, host_rewrite_header: x-new-host}}
  - {match: {prefix: /h/auto}, route: {cluster: named, auto_host_rewrite: true}}
  - {match: {prefix: /h/re}, route: {cluster: u, host_rewrite_path_regex: {pattern: {regex: "^/h/re/(.+)$"}, substitution: "\\1"}}}
  - {match: {prefix: /c/none}, route: {cluster: missing}}
  - {match: {prefix: /c/404}, route: {cluster: missing, cluster_not_found_response_code: NOT_FOUND}}
  - {match: {prefix: /c/empty}, route: {cluster: empty}}
  - {match: {prefix: /c/dead}, route: {cluster: dead}}
  - {match: {prefix: /c/header}, route: {cluster_header: x-cluster}}
  - {match: {prefix: /c/weighted}, route: {weighted_clusters: {clusters: [{name: u, weight: 1, request_headers_to_add: [{header: {key: x-w, value: u}}], response_headers_to_add: [{header: {key: x-wr, value: u}}]}, {name: dead, weight: 0}]}}}
  - {match: {prefix: /q, query_parameters: [{name: a, string_match: {exact: "1"}}]}, direct_response: {status: 201}}
  - {match: {prefix: /hm, headers: [{name: x-a, string_match: {prefix: b}}]}, direct_response: {status: 201}}
  - {match: {prefix: /case, case_sensitive: false}, direct_response: {status: 201}}
`, clusters: `
  - name: named
    type: STATIC
    load_assignment:
      cluster_name: named
      endpoints: [{lb_endpoints: [{endpoint: {hostname: auto.example, address: {socket_address: {address: 127.0.0.1, port_value: %d}}}}]}]
`, exchanges: []exchange{
		{name: "no route", send: get("/nothing", "")},
		{name: "no host matches path", send: []string{"GET /x HTTP/1.1|Host: strict.example||"}},
		{name: "attempt count", send: []string{"GET /only HTTP/1.1|Host: strict.example||"}},
		{name: "tls required", send: []string{"GET /x?y HTTP/1.1|Host: tls.example||"}},
		{name: "direct", send: get("/direct", "")},
		{name: "direct head", send: []string{"HEAD /direct HTTP/1.1|Host: a||"}},
		{name: "direct without body", send: get("/silent", "")},
		{name: "direct typed", send: get("/typed", "")},
		{name: "direct to a post", send: []string{"POST /direct HTTP/1.1|Host: a|Content-Length: 3||abc"}},
		{name: "direct to an unfinished post", send: []string{"POST /direct HTTP/1.1|Host: a|Content-Length: 30||abc"}},
		{name: "redirect host", send: get("/r/host/x?y=1", "")},
		{name: "redirect path", send: get("/r/path/x?y=1", "")},
		{name: "redirect query", send: get("/r/query/x?y=1", "")},
		{name: "redirect strip", send: get("/r/strip/x?y=1", "")},
		{name: "redirect https", send: []string{"GET /r/https?a HTTP/1.1|Host: a.example:80||"}},
		{name: "redirect https other port", send: []string{"GET /r/https?a HTTP/1.1|Host: a.example:81||"}},
		{name: "redirect port", send: []string{"GET /r/port HTTP/1.1|Host: a.example:81||"}},
		{name: "redirect prefix", send: get("/r/prefix/x?y=1", "")},
		{name: "redirect regex", send: get("/r/regex/x?y=1", "")},
		{name: "rewrite prefix", send: get("/w/prefix/x?y", "")},
		{name: "rewrite slash", send: get("/w/slash/x?y", "")},
		{name: "rewrite path", send: get("/w/path?y", "")},
		{name: "rewrite separated", send: get("/w/sep/x", "")},
		{name: "rewrite separated exactly", send: get("/w/sep", "")},
		{name: "rewrite regex", send: get("/w/re/a/b/c?y", "")},
		{name: "rewrite regex match by prefix", send: get("/w/rp/a/b/c?y", "")},
		{name: "host literal", send: get("/h/literal", "")},
		{name: "host literal forwarded", send: get("/h/xfh", "X-Forwarded-Host: old|")},
		{name: "host header", send: get("/h/header", "X-New-Host: from.header|")},
		{name: "host header missing", send: get("/h/header", "")},
		{name: "host auto", send: get("/h/auto", "")},
		{name: "host by path", send: get("/h/re/x.example", "")},
		{name: "no cluster", send: get("/c/none", "")},
		{name: "no cluster 404", send: get("/c/404", "")},
		{name: "empty cluster", send: get("/c/empty", "")},
		{name: "dead cluster", send: get("/c/dead", "")},
		{name: "dead cluster, post", send: []string{"POST /c/dead HTTP/1.1|Host: a|Content-Length: 3||abc"}},
		{name: "cluster by header", send: get("/c/header", "x-cluster: u|")},
		{name: "cluster by wrong header", send: get("/c/header", "x-cluster: nope|")},
		{name: "cluster by missing header", send: get("/c/header", "")},
		{name: "weighted", send: get("/c/weighted", "")},
		{name: "query", send: get("/q?b=2&a=1", "")},
		{name: "header", send: get("/hm", "X-A: bcd|")},
		{name: "case", send: get("/CASE", "")},
	}}, world{name: "mutations", hosts: `
- name: all
  domains: ["*"]
  request_headers_to_add: [{header: {key: x-order, value: host}}, {header: {key: x-set, value: host}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}]
  request_headers_to_remove: [x-drop-host]
  response_headers_to_add: [{header: {key: x-resp, value: host}}]
  routes:
  - match: {prefix: /}
    request_headers_to_add:
    - {header: {key: x-order, value: route}}
    - {header: {key: x-set, value: route}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}
    - {header: {key: x-absent, value: added}, append_action: ADD_IF_ABSENT}
    - {header: {key: x-over, value: over}, append_action: OVERWRITE_IF_EXISTS}
    - {header: {key: x-path, value: "%REQ(:PATH)% %REQ(x-in)% %REQ(x-none?:METHOD)% 100%%"}}
    - {header: {key: x-empty, value: ""}}
    - {header: {key: x-keep, value: ""}, keep_empty_value: true}
    - {header: {key: x-proto, value: "%PROTOCOL%"}}
    - {header: {key: x-remote, value: "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"}}
    request_headers_to_remove: [x-drop]
    response_headers_to_add:
    - {header: {key: x-resp, value: route}}
    - {header: {key: x-code, value: "%RESPONSE_CODE%"}}
    - {header: {key: x-cluster, value: "%UPSTREAM_CLUSTER%"}}
    response_headers_to_remove: [x-secret]
    route: {cluster: u}
`, exchanges: []exchange{
		{name: "all", send: get("/p?q", "x-drop: 1|x-drop-host: 1|x-absent: there|x-over: old|x-in: in|x-order: client|x-set: client|x-do: headers x-secret: 1^x-resp: own|")},
		{name: "few", send: get("/", "")},
		{name: "on an error", send: get("/", "x-do: reset|"), skip: []string{"upstream"}},
	}}, world{name: "retries", hosts: routes(`
- match: {prefix: /5xx}
  route: {cluster: u, retry_policy: {retry_on: 5xx, num_retries: 2, retry_back_off: {base_interval: 0.001s}}}
- match: {prefix: /gateway}
  route: {cluster: u, retry_policy: {retry_on: gateway-error, num_retries: 2, retry_back_off: {base_interval: 0.001s}}}
- match: {prefix: /4xx}
  route: {cluster: u, retry_policy: {retry_on: retriable-4xx, retry_back_off: {base_interval: 0.001s}}}
- match: {prefix: /codes}
  route: {cluster: u, retry_policy: {retry_on: retriable-status-codes, retriable_status_codes: [418], retry_back_off: {base_interval: 0.001s}}}
- match: {prefix: /headers}
  route: {cluster: u, retry_policy: {retry_on: retriable-headers, retriable_headers: [{name: x-again, present_match: true}], retry_back_off: {base_interval: 0.001s}}}
- match: {prefix: /reset}
  route: {cluster: u, retry_policy: {retry_on: reset, num_retries: 2, retry_back_off: {base_interval: 0.001s}}}
- match: {prefix: /before}
  route: {cluster: u, retry_policy: {retry_on: reset-before-request, retry_back_off: {base_interval: 0.001s}}}
- match: {prefix: /connect}
  route: {cluster: dead, retry_policy: {retry_on: connect-failure, num_retries: 2, retry_back_off: {base_interval: 0.001s}}}
- match: {prefix: /try}
  route: {cluster: u, timeout: 5s, retry_policy: {retry_on: 5xx, num_retries: 1, per_try_timeout: 0.2s, retry_back_off: {base_interval: 0.001s}}}
- match: {prefix: /none}
  route: {cluster: u, retry_policy: {retry_on: 5xx, num_retries: 0}}
`), exchanges: []exchange{
		{name: "5xx then ok", send: get("/5xx", "x-do: status 500;ok|")},
		{name: "5xx for ever", send: get("/5xx", "x-do: status 503|")},
		{name: "5xx with a body sent", send: []string{"POST /5xx HTTP/1.1|Host: a|x-do: status 500;ok|Content-Length: 5||hello"}},
		{name: "5xx with chunks sent", send: []string{"POST /5xx HTTP/1.1|Host: a|x-do: status 500;ok|Transfer-Encoding: chunked||3|abc|", "2|de|0||"}},
		{name: "5xx by reset", send: []string{"POST /5xx HTTP/1.1|Host: a|x-do: reset;ok||"}},
		{name: "5xx not for 404", send: get("/5xx", "x-do: status 404;ok|")},
		{name: "gateway", send: get("/gateway", "x-do: status 502;ok|")},
		{name: "gateway not for 500", send: get("/gateway", "x-do: status 500;ok|")},
		{name: "409", send: get("/4xx", "x-do: status 409;ok|")},
		{name: "codes", send: get("/codes", "x-do: status 418;ok|")},
		{name: "headers", send: get("/headers", "x-do: headers x-again: 1;ok|")},
		{name: "reset", send: []string{"POST /reset HTTP/1.1|Host: a|x-do: reset;ok||"}},
		{name: "reset for ever", send: []string{"POST /reset HTTP/1.1|Host: a|x-do: reset||"}},
		{name: "reset in the head", send: get("/reset", "x-do: rawclose HTTP/1.1 2;ok|")},
		{name: "reset in the body", send: get("/reset", "x-do: rawclose HTTP/1.1 200 OK^content-length: 5^^ab|"), skip: []string{"end"}},
		{name: "not before request", send: []string{"POST /before HTTP/1.1|Host: a|x-do: reset;ok||"}},
		{name: "connect", send: get("/connect", "")},
		{name: "per try", send: get("/try", "x-do: hang|")},
		{name: "none left", send: get("/none", "x-do: status 500|")},
	}}, world{name: "timeouts", hcm: `
stream_idle_timeout: 0.3s
request_timeout: 0.6s
request_headers_timeout: 0.5s
`, hosts: routes(`
- match: {prefix: /route}
  route: {cluster: u, timeout: 0.2s}
- match: {prefix: /idle}
  route: {cluster: u, idle_timeout: 0.1s, timeout: 0s}
- match: {prefix: /duration}
  route: {cluster: u, timeout: 0s, idle_timeout: 0s, max_stream_duration: {max_stream_duration: 0.2s}}
- match: {prefix: /}
  route: {cluster: u}
`), exchanges: []exchange{
		{name: "route", send: get("/route", "x-do: hang|")},
		{name: "route, in the body", send: get("/route", "x-do: raw HTTP/1.1 200 OK^content-length: 5^^ab|"), skip: []string{"end"}},
		{name: "route idle", send: get("/idle", "x-do: hang|")},
		{name: "duration", send: get("/duration", "x-do: hang|")},
		{name: "stream idle", send: get("/", "x-do: hang|")},
		{name: "unfinished body", send: []string{"POST / HTTP/1.1|Host: hang|Content-Length: 10||abc"}},
		{name: "unfinished head", send: []string{"GET / HTTP/1.1|Host: hang|"}},
	}}, world{name: "upgrades", hcm: `
upgrade_configs: [{upgrade_type: websocket}]
`, exchanges: []exchange{
		{name: "websocket", send: []string{"GET /ws HTTP/1.1|Host: a|Connection: Upgrade|Upgrade: WebSocket|Sec-WebSocket-Key: x|x-do: upgrade||", "hello"}, half: true, differs: "Envoy ends both directions with the first; a tunnel's directions end one by one"},
		{name: "refused", send: []string{"GET /ws HTTP/1.1|Host: a|Connection: Upgrade|Upgrade: websocket|x-do: status 404||"}},
		{name: "other", send: []string{"GET /ws HTTP/1.1|Host: a|Connection: Upgrade|Upgrade: other||"}},
		{name: "unasked", send: []string{"GET /ws HTTP/1.1|Host: a|x-do: upgrade||"}, differs: "Envoy passes a 101 on that nobody asked for"},
	}}, world{name: "connect", hcm: `
upgrade_configs: [{upgrade_type: CONNECT}]
`, hosts: routes(`
- {match: {connect_matcher: {}}, route: {cluster: u}}
- {match: {prefix: /}, route: {cluster: u}}
`), exchanges: []exchange{
		{name: "get", send: get("/", "")},
		{name: "tunnel", send: []string{"CONNECT a:80 HTTP/1.1|Host: a:80|x-do: raw HTTP/1.1 200 OK^^hello||"}, skip: []string{"flags", "details"}}, // of the client's end, which ends both directions in Envoy
		{name: "refused", send: []string{"CONNECT a:80 HTTP/1.1|Host: a:80|x-do: status 403||"}},
	}}, world{name: "limits", hcm: `
max_request_headers_kb: 1
common_http_protocol_options: {max_headers_count: 10}
`, exchanges: []exchange{
		{name: "large head", send: get("/", "X: "+repeat("a", 3000)+"|")},
		{name: "many fields", send: get("/", repeat("X: 1|", 20))},
		{name: "fits", send: get("/", "X: "+repeat("a", 500)+"|")},
	}}, world{name: "breakers", hosts: routes(`
- match: {prefix: /}
  route: {cluster: narrow}
`), clusters: `
  - name: narrow
    type: STATIC
    circuit_breakers: {thresholds: [{max_requests: 0}]}
    load_assignment:
      cluster_name: narrow
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: %d}}}}]}]
`, exchanges: []exchange{
		{name: "overflow", send: get("/", "")},
	}})
}
