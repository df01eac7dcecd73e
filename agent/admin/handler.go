package admin

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/pprof"

	"github.com/sockmesh/sockmesh/agent/api"
)

// Source answers what the API is asked. Every method may be called at any time from any goroutine, returns values
// that nobody changes afterwards, and must not wait for traffic.
type Source interface {
	Status() api.Status
	Pods() []api.Pod
	Services() []api.Service
	Listeners() []api.Listener
	Routes() []api.Route
	Clusters() []api.Cluster
	Endpoints() []api.Endpoint
	Sockets() ([]api.Socket, error)
	Maps() ([]api.Map, error)
	// Dump returns ErrNotFound for a map that isn't ours.
	Dump(name string) (api.MapDump, error)
	Explain(api.ExplainRequest) (api.Explanation, error)
	// ConfigDump is Envoy's admin ConfigDump as JSON, secrets redacted.
	ConfigDump() (json.RawMessage, error)
	LogLevel() string
	SetLogLevel(string) error
}

// ErrNotFound and ErrBadRequest, wrapped by a Source, choose the answer's status.
var (
	ErrNotFound   = errors.New("not found")
	ErrBadRequest = errors.New("bad request")
)

// Handler routes the API's paths to src.
func Handler(src Source) http.Handler {
	mux := http.NewServeMux()
	get := func(path string, answer func(*http.Request) (any, error)) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			v, err := answer(r)
			reply(w, v, err)
		})
	}
	get("/status", func(*http.Request) (any, error) { return src.Status(), nil })
	get("/pods", func(*http.Request) (any, error) { return list(src.Pods()), nil })
	get("/services", func(r *http.Request) (any, error) { return services(src.Services(), r.URL.Query().Get("name")) })
	get("/listeners", func(*http.Request) (any, error) { return list(src.Listeners()), nil })
	get("/routes", func(*http.Request) (any, error) { return list(src.Routes()), nil })
	get("/clusters", func(*http.Request) (any, error) { return list(src.Clusters()), nil })
	get("/endpoints", func(*http.Request) (any, error) { return list(src.Endpoints()), nil })
	get("/sockets", func(*http.Request) (any, error) { v, err := src.Sockets(); return list(v), err })
	get("/maps", func(*http.Request) (any, error) { v, err := src.Maps(); return list(v), err })
	get("/maps/{name}", func(r *http.Request) (any, error) { return src.Dump(r.PathValue("name")) })
	get("/config_dump", func(*http.Request) (any, error) { return src.ConfigDump() })
	get("/logging", func(*http.Request) (any, error) { return api.Logging{Level: src.LogLevel()}, nil })
	// What the agent's memory and time go to: `go tool pprof` reads a file that curl --unix-socket fetched.
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("POST /logging", func(w http.ResponseWriter, r *http.Request) {
		var in api.Logging
		err := decode(r, &in)
		if err == nil {
			if e := src.SetLogLevel(in.Level); e != nil {
				err = fmt.Errorf("%w: level: %w", ErrBadRequest, e)
			}
		}
		reply(w, api.Logging{Level: src.LogLevel()}, err)
	})
	mux.HandleFunc("POST /explain", func(w http.ResponseWriter, r *http.Request) {
		var in api.ExplainRequest
		if err := decode(r, &in); err != nil {
			reply(w, nil, err)
			return
		}
		v, err := src.Explain(in)
		reply(w, v, err)
	})
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) { reply(w, paths, nil) })
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		reply(w, nil, fmt.Errorf("%w: %s %s; GET / lists the paths", ErrNotFound, r.Method, r.URL.Path))
	})
	return mux
}

// paths is GET /.
var paths = map[string]string{
	"/status": "the whole state at a glance", "/pods": "this node's pods", "/services": "Services and their backends",
	"/listeners": "xDS listeners and where each is handled", "/routes": "routes in matching order",
	"/clusters": "xDS clusters", "/endpoints": "their endpoints", "/sockets": "accelerated sockets",
	"/maps": "BPF maps and their fill", "/maps/NAME": "one map's content", "/config_dump": "Envoy's ConfigDump, secrets redacted",
	"/explain": "POST {from, url, method, headers}: every decision on a connection's way", "/logging": "GET, or POST {level}",
	"GET /debug/pprof/": "profiles of this process, for go tool pprof: heap, goroutine, profile?seconds=10, …",
}

// services are all, or those of a name: NAMESPACE/NAME, or NAME in any namespace.
func services(all []api.Service, name string) ([]api.Service, error) {
	if name == "" {
		return list(all), nil
	}
	var found []api.Service
	for _, s := range all {
		if s.Name == name || s.Namespace+"/"+s.Name == name {
			found = append(found, s)
		}
	}
	if found == nil {
		return nil, fmt.Errorf("Service %q: %w", name, ErrNotFound)
	}
	return found, nil
}

// list makes an empty list of none, so that readers of the JSON never meet null.
func list[T any](v []T) []T {
	if v == nil {
		return []T{}
	}
	return v
}

func decode(r *http.Request, into any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("%w: expected a JSON object: %w", ErrBadRequest, err)
	}
	return nil
}

// reply writes the whole answer at once.
func reply(w http.ResponseWriter, v any, err error) {
	status := http.StatusOK
	if err != nil {
		v = api.Error{Error: err.Error()}
		switch {
		case errors.Is(err, ErrNotFound):
			status = http.StatusNotFound
		case errors.Is(err, ErrBadRequest):
			status = http.StatusBadRequest
		default:
			status = http.StatusInternalServerError
		}
	}
	b, err := json.Marshal(v)
	if err != nil {
		status, b = http.StatusInternalServerError, []byte(`{"error":"the answer could not be written as JSON"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", fmt.Sprint(len(b)+1))
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n')) // a client that has gone is its own loss
}
