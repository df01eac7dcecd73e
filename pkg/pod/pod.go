// Package pod finds the network namespaces of this node's pods and opens the proxy's listening sockets inside them.
//
// A pod's network namespace is the one under the netns folder (/var/run/netns) that owns the pod's address. That
// needs no container runtime's API and works for pods that nothing but a test made. The Manager joins three things
// that change at any time, wanted pods (Kubernetes), namespace files (inotify) and addresses in a namespace (netlink),
// in one goroutine, and tells a Handler of every pod that is complete.
//
// Whoever holds a descriptor of a namespace, or a socket in it, keeps it alive. So everything of a namespace is closed
// as soon as its file is gone, and what is handed out (PodReady) belongs to the receiver, who must close it too.
package pod

import (
	"log/slog"
	"net/netip"
	"os"
	"time"
)

// DefaultOutboundPort is where the proxy listens inside each enrolled pod, on 127.0.0.1 and ::1.
const DefaultOutboundPort = 15001

// Spec is a pod that should be served on this node.
type Spec struct {
	UID            string
	Namespace      string
	Name           string
	ServiceAccount string
	IPs            []netip.Addr
	// Enrolled pods get listeners; the others are only found.
	Enrolled bool
	// Ignored pods (host network, or in a terminal phase) have no namespace of their own here.
	Ignored bool
	// Deleting and Created settle which of two pods that claim one address is the living one.
	Deleting bool
	Created  time.Time
	// AccelerateBlocking is passed through.
	AccelerateBlocking bool
}

// Pod is a pod in its network namespace.
type Pod struct {
	Spec
	// Cookie is the kernel's name of the namespace, never used again (SO_NETNS_COOKIE).
	Cookie uint64
	// NetnsName is the namespace's file below the folder.
	NetnsName string
	// Netns and Listeners are set together and belong to the receiver, who closes them: a descriptor of the
	// namespace, and sockets listening on 127.0.0.1 and, where the pod has it, [::1], at Config.OutboundPort
	// (non-blocking, close-on-exec, SO_REUSEPORT, plain TCP).
	Netns     *os.File
	Listeners []int
}

// A Handler is told which pods are here. All calls come from one goroutine.
type Handler interface {
	// PodReady: the pod's namespace is known. It may be called again for the same UID when something changed; the newest
	// description counts. Netns and Listeners of an enrolled pod come once, as soon as the listeners are open: with the
	// first call, unless they can't be opened. Then the pod is enrolled without, and its connections meet the fail mode.
	PodReady(p Pod)
	// PodGone: the pod or its namespace is gone. Everything received for it must be closed. PodReady may follow at
	// once, if the pod is no longer enrolled, or got an IPv6 loopback, or is in another namespace.
	PodGone(uid string)
}

// Config configures a Manager.
type Config struct {
	// NetnsDir is the folder of network namespaces; it may appear later.
	NetnsDir string
	// OutboundPort defaults to DefaultOutboundPort.
	OutboundPort uint16
	// Handler is told which pods are here.
	Handler Handler
	// Own is told of each listener before it is bound; Owns says whether a listener that was found on the port, by its
	// socket cookie, was made by an agent that told so. Both may be nil: nobody asks.
	Own  func(fd int) error
	Owns func(cookie uint64) (bool, error)
	// Foreign: a listener on the port that is the pod's own gets the pod's connections (datapath.Config.ForeignProxy).
	Foreign bool
	// Logger defaults to slog.Default.
	Logger *slog.Logger
}

// Status is what the Manager knows of one wanted pod.
type Status struct {
	Spec
	// Ready: announced to the Handler.
	Ready     bool   `json:"ready"`
	Cookie    uint64 `json:"cookie,omitempty"`
	NetnsName string `json:"netns,omitempty"`
	// Reason says why it is not ready, or what is unusual.
	Reason string `json:"reason,omitempty"`
}
