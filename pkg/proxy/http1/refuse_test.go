package http1

import (
	"strings"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/mesh"
)

// Every shape here lets two parsers disagree about where a message ends, what it is for, or who sent it.
func TestSmugglingShapesAreRefused(t *testing.T) {
	const get, post = "GET / HTTP/1.1\r\nHost: a\r\n", "POST / HTTP/1.1\r\nHost: a\r\n"
	for name, c := range map[string]struct {
		input string
		want  *ParseError
	}{
		"length beside chunked":           {post + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n", ErrLengthAndTE},
		"chunked beside length":           {post + "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n", ErrLengthAndTE},
		"two lengths":                     {post + "Content-Length: 4\r\nContent-Length: 5\r\n\r\n", ErrDuplicateLength},
		"two equal lengths":               {post + "Content-Length: 4\r\ncontent-length: 4\r\n\r\n", ErrDuplicateLength},
		"a list of lengths":               {post + "Content-Length: 4, 4\r\n\r\n", ErrContentLength},
		"a length with a sign":            {post + "Content-Length: +4\r\n\r\n", ErrContentLength},
		"a negative length":               {post + "Content-Length: -4\r\n\r\n", ErrContentLength},
		"a hexadecimal length":            {post + "Content-Length: 0x4\r\n\r\n", ErrContentLength},
		"an empty length":                 {post + "Content-Length:\r\n\r\n", ErrContentLength},
		"a length with a blank in it":     {post + "Content-Length: 4 4\r\n\r\n", ErrContentLength},
		"a length beyond 63 bits":         {post + "Content-Length: 9223372036854775808\r\n\r\n", ErrContentLength},
		"a length beyond 64 bits":         {post + "Content-Length: 18446744073709551620\r\n\r\n", ErrContentLength},
		"two transfer codings":            {post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", ErrTransferEncoding},
		"chunked twice":                   {post + "Transfer-Encoding: chunked, chunked\r\n\r\n", ErrTransferEncoding},
		"identity":                        {post + "Transfer-Encoding: identity\r\n\r\n", ErrTransferEncoding},
		"gzip, chunked":                   {post + "Transfer-Encoding: gzip, chunked\r\n\r\n", ErrTransferEncoding},
		"an empty transfer coding":        {post + "Transfer-Encoding:\r\n\r\n", ErrTransferEncoding},
		"almost chunked":                  {post + "Transfer-Encoding: \x0bchunked\r\n\r\n", ErrFieldValue},
		"chunked in quotes":               {post + "Transfer-Encoding: \"chunked\"\r\n\r\n", ErrTransferEncoding},
		"chunked in HTTP/1.0":             {"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", ErrTEForbidden},
		"a blank before the colon":        {post + "Transfer-Encoding : chunked\r\n\r\n", ErrFieldName},
		"a tab before the colon":          {post + "Content-Length\t: 4\r\n\r\n", ErrFieldName},
		"a folded value":                  {post + "X: y\r\n Content-Length: 4\r\n\r\n", ErrFolded},
		"a folded value by tab":           {post + "X: y\r\n\tz\r\n\r\n", ErrFolded},
		"a first field that is folded":    {"POST / HTTP/1.1\r\n Host: a\r\n\r\n", ErrFolded},
		"LF alone after a field":          {post + "X: y\nContent-Length: 4\r\n\r\n", ErrBareLF},
		"LF alone for the empty line":     {post + "X: y\r\n\n", ErrBareLF},
		"CR alone in a value":             {post + "X: y\rContent-Length: 4\r\n\r\n", ErrBareCR},
		"CR alone for the empty line":     {post + "X: y\r\n\rX", ErrBareCR},
		"CR twice":                        {post + "X: y\r\r\n\r\n", ErrBareCR},
		"NUL in a value":                  {post + "X: y\x00z\r\n\r\n", ErrFieldValue},
		"NUL in a name":                   {post + "X\x00: y\r\n\r\n", ErrFieldName},
		"DEL in a value":                  {post + "X: 12345678\x7f12345678\r\n\r\n", ErrFieldValue},
		"a name that is not ASCII":        {post + "X\xe9: y\r\n\r\n", ErrFieldName},
		"no name":                         {post + ": y\r\n\r\n", ErrFieldName},
		"no colon":                        {post + "Content-Length 4\r\n\r\n", ErrFieldName},
		"a pseudo field":                  {post + ":path: /other\r\n\r\n", ErrFieldName},
		"two hosts":                       {get + "Host: b\r\n\r\n", ErrDuplicateHost},
		"two equal hosts":                 {get + "Host: a\r\n\r\n", ErrDuplicateHost},
		"a host with a path":              {"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", ErrHost},
		"a host with user information":    {"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", ErrHost},
		"a host with a blank":             {"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", ErrHost},
		"two hosts with an absolute URL":  {"GET http://a/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", ErrDuplicateHost},
		"no host":                         {"GET / HTTP/1.1\r\n\r\n", ErrMissingHost},
		"a blank in the target":           {"GET /a b HTTP/1.1\r\n", ErrVersion},
		"two blanks after the method":     {"GET  / HTTP/1.1\r\n", ErrTarget},
		"a tab after the method":          {"GET\t/ HTTP/1.1\r\n", ErrMethod},
		"a blank before the method":       {" GET / HTTP/1.1\r\n", ErrMethod},
		"a control character in a target": {"GET /\x01 HTTP/1.1\r\n", ErrTarget},
		"a target that is not ASCII":      {"GET /\xc3\xa9 HTTP/1.1\r\n", ErrTarget},
		"a fragment":                      {"GET /a#b HTTP/1.1\r\n", ErrFragment},
		"a relative target":               {"GET a HTTP/1.1\r\n", ErrTarget},
		"a fragment of an absolute URL":   {"GET http://a/#b HTTP/1.1\r\n", ErrFragment},
		"a bare scheme":                   {"GET http:// HTTP/1.1\r\n", ErrTarget},
		"another scheme":                  {"GET ftp://a/ HTTP/1.1\r\n", ErrScheme},
		"an absolute URL without host":    {"GET http:///a HTTP/1.1\r\n", ErrTarget},
		"the asterisk with GET":           {"GET * HTTP/1.1\r\n", ErrTarget},
		"a CONNECT without port":          {"CONNECT a HTTP/1.1\r\n", ErrTarget},
		"a CONNECT with a path":           {"CONNECT /a:1 HTTP/1.1\r\n", ErrTarget},
		"a CONNECT with a body":           {"CONNECT a:1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n", ErrLengthForbidden},
		"HTTP/0.9":                        {"GET /\r\n", ErrTarget},
		"HTTP/1.2":                        {"GET / HTTP/1.2\r\n", ErrVersion},
		"HTTP/2.0":                        {"PRI * HTTP/2.0\r\n", ErrVersion},
		"http/1.1":                        {"GET / http/1.1\r\n", ErrVersion},
		"a blank after the version":       {"GET / HTTP/1.1 \r\n", ErrVersion},
		"LF alone after the request line": {"GET / HTTP/1.1\nHost: a\n\n", ErrVersion},
		"a method that never ends":        {strings.Repeat("A", maxMethod+1), ErrMethod},
		"a chunk size with a sign":        {post + "Transfer-Encoding: chunked\r\n\r\n+1\r\n", ErrChunkSize},
		"a chunk size with 0x":            {post + "Transfer-Encoding: chunked\r\n\r\n0x1\r\n", ErrChunkSize},
		"a chunk size with a blank":       {post + "Transfer-Encoding: chunked\r\n\r\n1 \r\n", ErrChunkSize},
		"a blank before the chunk size":   {post + "Transfer-Encoding: chunked\r\n\r\n 1\r\n", ErrChunkSize},
		"no chunk size":                   {post + "Transfer-Encoding: chunked\r\n\r\n\r\n", ErrChunkSize},
		"a chunk size that overflows":     {post + "Transfer-Encoding: chunked\r\n\r\n10000000000000001\r\n", ErrChunkSize},
		"LF alone after a chunk size":     {post + "Transfer-Encoding: chunked\r\n\r\n1\nA\r\n", ErrBareLF},
		"CR alone after a chunk size":     {post + "Transfer-Encoding: chunked\r\n\r\n1\rA", ErrBareCR},
		"a chunk that is longer":          {post + "Transfer-Encoding: chunked\r\n\r\n1\r\nAB\r\n", ErrChunkEnd},
		"LF alone after a chunk":          {post + "Transfer-Encoding: chunked\r\n\r\n1\r\nA\n", ErrChunkEnd},
		"an extension without name":       {post + "Transfer-Encoding: chunked\r\n\r\n1;\r\n", ErrChunkExtension},
		"an extension with LF":            {post + "Transfer-Encoding: chunked\r\n\r\n1;a=b\nA\r\n", ErrBareLF},
		"a quotation that never ends":     {post + "Transfer-Encoding: chunked\r\n\r\n1;a=\"\r\n", ErrChunkExtension},
		"a trailer that frames":           {post + "Transfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 4\r\n\r\n", ErrTrailer},
		"a trailer that routes":           {post + "Transfer-Encoding: chunked\r\n\r\n0\r\nHost: b\r\n\r\n", ErrTrailer},
		"a folded trailer":                {post + "Transfer-Encoding: chunked\r\n\r\n0\r\nA: b\r\n c\r\n\r\n", ErrFolded},
	} {
		t.Run(name, func(t *testing.T) {
			opt := &Options{AcceptHTTP10: true}
			got := checkSplits(t, []byte(c.input), 1, func(in string, cuts ...int) transcript { return runRequest(t, opt, in, cuts...) })
			if got.Err != c.want.Error() {
				t.Errorf("%q: %q, want %q", c.input, got.Err, c.want)
			}
		})
	}
}

func TestResponsesThatDeceiveAreRefused(t *testing.T) {
	for name, c := range map[string]struct {
		input string
		kind  RequestKind
		want  *ParseError
	}{
		"length beside chunked":       {"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n", 0, ErrLengthAndTE},
		"two lengths":                 {"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\n", 0, ErrDuplicateLength},
		"204 with a body":             {"HTTP/1.1 204 No Content\r\nContent-Length: 4\r\n\r\n", 0, ErrLengthForbidden},
		"204 chunked":                 {"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n", 0, ErrTEForbidden},
		"100 with a body":             {"HTTP/1.1 100 Continue\r\nContent-Length: 4\r\n\r\n", 0, ErrLengthForbidden},
		"a tunnel with a body":        {"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n", ToConnect, ErrLengthForbidden},
		"101 that nobody asked for":   {"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", 0, ErrUpgrade},
		"chunked in HTTP/1.0":         {"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 0, ErrTEForbidden},
		"a status of two digits":      {"HTTP/1.1 20 OK\r\n", 0, ErrStatusLine},
		"a status of four digits":     {"HTTP/1.1 2000 OK\r\n", 0, ErrStatusLine},
		"a status below 100":          {"HTTP/1.1 099 OK\r\n", 0, ErrStatusLine},
		"two blanks":                  {"HTTP/1.1  200 OK\r\n", 0, ErrStatusLine},
		"LF alone":                    {"HTTP/1.1 200 OK\n\n", 0, ErrBareLF},
		"CR alone in the reason":      {"HTTP/1.1 200 O\rK\r\n", 0, ErrBareCR},
		"a blank line first":          {"\r\nHTTP/1.1 200 OK\r\n", 0, ErrStatusLine},
		"HTTP/2":                      {"HTTP/2 200\r\n", 0, ErrStatusLine},
		"1xx without end":             {strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", maxInterim+1), 0, ErrInterim},
		"something else (SSH)":        {"SSH-2.0-OpenSSH\r\n", 0, ErrStatusLine},
		"an answer that is no header": {"HTTP/1.1 200 OK\r\n\x00\r\n\r\n", 0, ErrFieldName},
	} {
		t.Run(name, func(t *testing.T) {
			got := checkSplits(t, []byte(c.input), 1, func(in string, cuts ...int) transcript {
				return runResponse(t, &Options{}, c.kind, in, cuts...)
			})
			if got.Err != c.want.Error() {
				t.Errorf("%q: %q, want %q", c.input, got.Err, c.want)
			}
		})
	}
}

func TestLimitsHold(t *testing.T) {
	limits := Limits{HeadBytes: 200, Fields: 3, ChunkLine: 20, ChunkExtensions: 40}
	chunked := "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
	for name, c := range map[string]struct {
		input string
		want  *ParseError
	}{
		"a head of just the limit":   {"GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 200-32) + "\r\n\r\n", nil},
		"one byte more":              {"GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 201-32) + "\r\n\r\n", ErrHeadTooLarge},
		"a target without end":       {"GET /" + strings.Repeat("x", 300), ErrHeadTooLarge},
		"a name without end":         {"GET / HTTP/1.1\r\n" + strings.Repeat("x", 300), ErrHeadTooLarge},
		"a value without end":        {"GET / HTTP/1.1\r\nX: " + strings.Repeat("x", 300), ErrHeadTooLarge},
		"blank lines without end":    {strings.Repeat("\r\n", 101), ErrHeadTooLarge},
		"as many fields as allowed":  {"GET / HTTP/1.1\r\nHost: a\r\nA: 1\r\nB: 2\r\n\r\n", nil},
		"one more":                   {"GET / HTTP/1.1\r\nHost: a\r\nA: 1\r\nB: 2\r\nC: 3\r\n\r\n", ErrTooManyFields},
		"zeroes without end":         {chunked + strings.Repeat("0", 21), ErrChunkTooLong},
		"an extension without end":   {chunked + "1;" + strings.Repeat("a", 30), ErrChunkTooLong},
		"extensions without end":     {chunked + strings.Repeat("1;aaaaaaaa\r\nA\r\n", 5), ErrChunkTooLong},
		"trailers without end":       {chunked + "0\r\nX: " + strings.Repeat("x", 300), ErrHeadTooLarge},
		"trailers of just the limit": {chunked + "0\r\nX: " + strings.Repeat("x", 200-7) + "\r\n\r\n", nil},
		"too many trailers":          {chunked + "0\r\nA: 1\r\nB: 2\r\nC: 3\r\nD: 4\r\n\r\n", ErrTooManyFields},
	} {
		t.Run(name, func(t *testing.T) {
			opt := &Options{Limits: limits}
			got := checkSplits(t, []byte(c.input), 1, func(in string, cuts ...int) transcript { return runRequest(t, opt, in, cuts...) })
			want := ""
			if c.want != nil {
				want = c.want.Error()
			}
			if got.Err != want || want == "" && (len(got.Messages) != 1 || !got.Messages[0].Complete) {
				t.Errorf("%+v, want %q", got, want)
			}
		})
	}
	if ErrHeadTooLarge.Status != 431 || ErrTooManyFields.Status != 431 {
		t.Error("limits are answered with 431")
	}
}

func TestListenerOptions(t *testing.T) {
	for name, c := range map[string]struct {
		opt   Options
		input string
		want  string // head, or error
	}{
		"HTTP/1.0 is refused":            {Options{}, "GET / HTTP/1.0\r\nHost: a\r\n\r\n", ErrHTTP10.Error()},
		"unless it is accepted":          {Options{AcceptHTTP10: true}, "GET / HTTP/1.0\r\nHost: a\r\n\r\n", "GET \"/\" \"a\" \"\"\n"},
		"with a host by default":         {Options{AcceptHTTP10: true, DefaultHost: "d"}, "GET / HTTP/1.0\r\n\r\n", "GET \"/\" \"d\" \"\"\n"},
		"underscores are usual":          {Options{}, "GET / HTTP/1.1\r\nHost: a\r\nx_y: 1\r\n\r\n", "GET \"/\" \"a\" \"\"\nx_y=1\n"},
		"underscores are refused":        {Options{Underscores: mesh.UnderscoresReject}, "GET / HTTP/1.1\r\nHost: a\r\nx_y: 1\r\n\r\n", ErrUnderscore.Error()},
		"underscores are dropped":        {Options{Underscores: mesh.UnderscoresDrop}, "GET / HTTP/1.1\r\nHost: a\r\nx_y: 1\r\nz: 2\r\n_: 3\r\n\r\n", "GET \"/\" \"a\" \"\"\nz=2\n"},
		"an absolute URL names the host": {Options{}, "GET HTTP://b:81/x?y HTTP/1.1\r\nHost: a\r\n\r\n", "GET \"/x?y\" \"b:81\" \"http\"\n"},
		"and needs no path":              {Options{}, "GET https://b HTTP/1.1\r\nHost: a\r\n\r\n", "GET \"/\" \"b\" \"https\"\n"},
		"but a query":                    {Options{}, "GET http://b?q HTTP/1.1\r\n\r\n", "GET \"/?q\" \"b\" \"http\"\n"},
		"or an asterisk":                 {Options{}, "OPTIONS http://b HTTP/1.1\r\n\r\n", "OPTIONS \"*\" \"b\" \"http\"\n"},
		"where it is allowed":            {Options{NoAbsoluteForm: true}, "GET http://b/ HTTP/1.1\r\n\r\n", ErrAbsoluteForm.Error()},
		"an IPv6 host":                   {Options{}, "GET / HTTP/1.1\r\nHost: [fd00::1]:80\r\n\r\n", "GET \"/\" \"[fd00::1]:80\" \"\"\n"},
	} {
		t.Run(name, func(t *testing.T) {
			got := runRequest(t, &c.opt, c.input)
			said := got.Err
			if said == "" && len(got.Messages) == 1 {
				said = got.Messages[0].Head
			}
			if said != c.want {
				t.Errorf("%q, want %q", said, c.want)
			}
		})
	}
}
