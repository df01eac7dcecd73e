package agent

import (
	"io"
	"log/slog"

	"k8s.io/klog/v2"

	"github.com/sockmesh/sockmesh/agent/config"
)

// NewLogger makes the agent's logger. The level can be changed while it runs (sockmesh logging LEVEL).
func NewLogger(w io.Writer, format string, level *slog.LevelVar) *slog.Logger {
	opts := &slog.HandlerOptions{Level: level}
	var h slog.Handler = slog.NewTextHandler(w, opts)
	if format == config.LogJSON {
		h = slog.NewJSONHandler(w, opts)
	}
	log := slog.New(h)
	// client-go logs through klog; without this its lines would have a format of their own.
	klog.SetSlogLogger(log.With("component", "client-go"))
	return log
}
