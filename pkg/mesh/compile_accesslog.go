package mesh

import (
	"fmt"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	filelogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/file/v3"
	streamlogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stream/v3"
	"google.golang.org/protobuf/types/known/structpb"
)

// accessLogs compiles the access logs that we can write. One that we cannot (a gRPC sink, a CEL filter) is left
// out and reported: it observes requests and does not treat them, which is no reason to refuse a listener.
func (c *compiler) accessLogs(at *path, logs []*accesslogv3.AccessLog) []*AccessLog {
	var list []*AccessLog
	for i, m := range logs {
		here := at.at(i)
		sub := newCompiler(c.kind, c.name)
		sub.walk(here, m)
		compiled := sub.accessLog(here, m)
		for _, r := range sub.refused {
			c.addWarning(fmt.Sprintf("%s: %s: %s", here.general(), m.GetName(), r.Reason))
		}
		for _, w := range sub.warnings {
			c.addWarning(w.Field)
		}
		if len(sub.refused) == 0 {
			list = append(list, compiled)
		}
	}
	return list
}

func (c *compiler) addWarning(field string) {
	c.warn((*path)(nil).field(field))
}

func (c *compiler) accessLog(at *path, m *accesslogv3.AccessLog) *AccessLog {
	log := &AccessLog{}
	here := at.field("typed_config")
	switch name := typeName(m.GetTypedConfig()); name {
	case "envoy.extensions.access_loggers.file.v3.FileAccessLog":
		file := &filelogv3.FileAccessLog{}
		if c.unpack(here, m.GetTypedConfig(), file) {
			log.Path = file.GetPath()
			log.Format = file.GetFormat()
			if s := file.GetJsonFormat(); s != nil {
				log.JSON = s.AsMap()
			}
			if s := file.GetTypedJsonFormat(); s != nil {
				log.JSON = s.AsMap()
			}
			c.logFormat(here.field("log_format"), file.GetLogFormat(), log)
		}
	case "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog":
		stream := &streamlogv3.StdoutAccessLog{}
		if c.unpack(here, m.GetTypedConfig(), stream) {
			log.Path = "/dev/stdout"
			c.logFormat(here.field("log_format"), stream.GetLogFormat(), log)
		}
	case "envoy.extensions.access_loggers.stream.v3.StderrAccessLog":
		stream := &streamlogv3.StderrAccessLog{}
		if c.unpack(here, m.GetTypedConfig(), stream) {
			log.Path = "/dev/stderr"
			c.logFormat(here.field("log_format"), stream.GetLogFormat(), log)
		}
	default:
		c.refuse(here, "%s is not supported", name)
	}
	if log.Format == "" && log.JSON == nil {
		log.Format = DefaultAccessLogFormat
	}
	if m.GetFilter() != nil {
		log.Filter = c.logFilter(at.field("filter"), m.GetFilter())
	}
	if len(c.refused) == 0 {
		if err := formatChecks.AccessLog(log); err != nil {
			c.refuse(here, "%v", err)
		}
	}
	return log
}

// DefaultAccessLogFormat is Envoy's.
const DefaultAccessLogFormat = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" " +
	"%RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% " +
	"%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" " +
	"\"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\"\n"

func (c *compiler) logFormat(at *path, m *corev3.SubstitutionFormatString, log *AccessLog) {
	if m == nil {
		return
	}
	log.OmitEmpty = m.GetOmitEmptyValues()
	for i, f := range m.GetFormatters() {
		// Formatters add command operators of their own; one that is used is then refused by its name.
		c.warn(at.field("formatters").at(i).key(f.GetName()))
	}
	switch format := m.GetFormat().(type) {
	case *corev3.SubstitutionFormatString_TextFormat:
		log.Format = format.TextFormat
	case *corev3.SubstitutionFormatString_TextFormatSource:
		log.Format = string(c.data(at.field("text_format_source"), format.TextFormatSource))
	case *corev3.SubstitutionFormatString_JsonFormat:
		log.JSON = structMap(format.JsonFormat)
	}
}

func structMap(s *structpb.Struct) map[string]any {
	if s == nil {
		return map[string]any{}
	}
	return s.AsMap()
}

// data is a DataSource's content; only inline sources get past the support table.
func (c *compiler) data(_ *path, m *corev3.DataSource) []byte {
	if s := m.GetInlineString(); s != "" {
		return []byte(s)
	}
	return m.GetInlineBytes()
}

func (c *compiler) logFilter(at *path, m *accesslogv3.AccessLogFilter) *AccessLogFilter {
	f := &AccessLogFilter{}
	switch spec := m.GetFilterSpecifier().(type) {
	case *accesslogv3.AccessLogFilter_StatusCodeFilter:
		f.StatusCode = comparison(spec.StatusCodeFilter.GetComparison())
	case *accesslogv3.AccessLogFilter_DurationFilter:
		f.DurationMS = comparison(spec.DurationFilter.GetComparison())
	case *accesslogv3.AccessLogFilter_NotHealthCheckFilter:
		f.NotHealth = true
	case *accesslogv3.AccessLogFilter_RuntimeFilter:
		ppm := c.fraction(at.field("runtime_filter").field("percent_sampled"), spec.RuntimeFilter.GetPercentSampled())
		f.FractionPPM = &ppm
	case *accesslogv3.AccessLogFilter_AndFilter:
		for i, sub := range spec.AndFilter.GetFilters() {
			f.And = append(f.And, c.logFilter(at.field("and_filter").field("filters").at(i), sub))
		}
	case *accesslogv3.AccessLogFilter_OrFilter:
		for i, sub := range spec.OrFilter.GetFilters() {
			f.Or = append(f.Or, c.logFilter(at.field("or_filter").field("filters").at(i), sub))
		}
	case *accesslogv3.AccessLogFilter_HeaderFilter:
		f.Header = c.headerMatcher(at.field("header_filter").field("header"), spec.HeaderFilter.GetHeader())
	case *accesslogv3.AccessLogFilter_ResponseFlagFilter:
		f.ResponseFlags = append([]string{}, spec.ResponseFlagFilter.GetFlags()...)
	case nil:
		c.refuse(at, "empty filter")
	}
	return f
}

func comparison(m *accesslogv3.ComparisonFilter) *Comparison {
	op := byte('=')
	switch m.GetOp() {
	case accesslogv3.ComparisonFilter_GE:
		op = '>'
	case accesslogv3.ComparisonFilter_LE:
		op = '<'
	case accesslogv3.ComparisonFilter_NE:
		op = '!'
	}
	return &Comparison{Op: op, Value: uint64(m.GetValue().GetDefaultValue())}
}
