package http_test

import (
	"os"
	"testing"

	"github.com/sockmesh/sockmesh/pkg/proxy/loop/looptest"
)

func TestMain(m *testing.M) { os.Exit(looptest.OnEachBackend(m)) }
