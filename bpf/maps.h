/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The maps. All hooks share them, and they outlive the agent: pinned under <bpffs>/v<layout>/maps. Capacities are
 * set by the loader. pkg/datapath's reconciler is the only writer of those that hold configuration.
 */
#ifndef SM_MAPS_H
#define SM_MAPS_H

#include "common.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sm_config);
} sm_config SEC(".maps");

/* Service addresses. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, struct sm_frontend_key);
	__type(value, struct sm_target);
} sm_frontends SEC(".maps");

/* Addresses that an xDS listener claims for the connections of enrolled pods. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct sm_claim_key);
	__type(value, struct sm_target);
} sm_claims SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 524288);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct sm_slot_key);
	__type(value, struct sm_slot);
} sm_slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct sm_backend);
} sm_backends SEC(".maps");

/* The same addresses, and more, as clients outside this node see them. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct sm_frontend_key);
	__type(value, struct sm_target);
} sm_outside SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct sm_member_key);
	__type(value, __u32);
} sm_members SEC(".maps");

/* LRU: a client that is forgotten is balanced anew. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct sm_affinity_key);
	__type(value, struct sm_affinity);
} sm_affinity SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct sm_source_key);
	__type(value, __u32);
} sm_sources SEC(".maps");

/* Network namespaces (by cookie) whose connections listeners may claim. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, struct sm_netns);
} sm_netns SEC(".maps");

struct sm_local_key {
	__u8 addr[16] SM_ALIGNED;
};

/* Addresses of this node's pods: where the second leg can be redirected too. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct sm_local_key);
	__type(value, struct sm_local);
} sm_local SEC(".maps");

/* Connections between the two ends' ESTABLISHED, microseconds each. LRU: an entry whose other end never comes
 * (a full backlog, a dead peer) must not stay for ever. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct sm_tuple);
	__type(value, struct sm_origin);
} sm_origin SEC(".maps");

/* Listeners in pods, by socket cookie, that some agent made: how the next agent knows its predecessor's from a stranger's
 * on the same port. LRU: those of dead agents are never looked for again. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 32768);
	__type(key, __u64);
	__type(value, __u32);
} sm_listeners SEC(".maps");

/* What we know of a socket; dies with it. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct sm_sock);
} sm_sock SEC(".maps");

/* The same for UDP sockets that talk to Services. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct sm_udp);
} sm_udp SEC(".maps");

/* LRU: a flow that is forgotten is balanced anew, and a late answer of its backend comes under that one's address. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct sm_udp_key);
	__type(value, struct sm_udp_flow);
} sm_udp_more SEC(".maps");

/* Sockets to be ended, by cookie, for as long as the agent is at it: see end.bpf.c. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, __u32);
} sm_doomed SEC(".maps");

/* Enrolled sockets, each under its own view of the connection. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 131072);
	__type(key, struct sm_tuple);
	__type(value, __u64);
} sm_pairs SEC(".maps");

/* Applications that splice their sockets, and when that was seen last (ktime): they are left alone. LRU: one that is
 * forgotten is found out again. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct sm_app);
	__type(value, __u64);
} sm_nosplice SEC(".maps");

/* Enrolled sockets that are being spliced, by their own view: their other ends must go on by TCP. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct sm_tuple);
	__type(value, struct sm_spliced);
} sm_spliced SEC(".maps");

/* Is anything in sm_spliced? Saves sm_msg the look-up. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} sm_splicing SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sm_counters);
} sm_counters SEC(".maps");

/* Directions that the proxy has handed over: see aside.h. It belongs to one agent, whose proxy has it in its memory, so it
 * is not pinned. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct sm_aside_dir);
} aside_slots SEC(".maps");

/* One for each loop of the proxy, in the same memory. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, SM_ASIDE_DESKS);
	__type(key, __u32);
	__type(value, struct sm_aside_desk);
} aside_desks SEC(".maps");

static __always_inline struct sm_config *sm_configuration(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&sm_config, &zero);
}

static __always_inline struct sm_counters *sm_counts(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&sm_counters, &zero);
}

/* Bumps one counter of this CPU. */
#define SM_COUNT(field)                                                                            \
	({                                                                                         \
		struct sm_counters *c_ = sm_counts();                                              \
		if (c_)                                                                            \
			c_->field++;                                                               \
	})

#define SM_ADD(field, n)                                                                           \
	({                                                                                         \
		struct sm_counters *c_ = sm_counts();                                              \
		if (c_)                                                                            \
			c_->field += (n);                                                          \
	})

/* Counts a message and its bytes. */
#define SM_COUNT_BYTES(messages, bytes, n)                                                         \
	({                                                                                         \
		struct sm_counters *c_ = sm_counts();                                              \
		if (c_) {                                                                          \
			c_->messages++;                                                            \
			c_->bytes += (n);                                                          \
		}                                                                                  \
	})

#endif
