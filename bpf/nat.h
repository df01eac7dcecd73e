/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What is remembered of the connections of clients outside, and where. nat.bpf.c says how they travel.
 *
 * A connection has up to three forms, one per stretch of its way: client and frontend, as it arrives at this node; client
 * and backend, as the node's own stack, packet filters and NetworkPolicy see it; and, where the node speaks for the client,
 * node and backend. The middle form names the connection: sm_nat holds what is known of it under that name, and
 * sm_nat_in leads there from the two forms in which packets arrive.
 *
 * A connection whose handshake isn't over lives in sm_nat_new and sm_nat_new_in. Those are LRU: a flood of connections
 * that never come about pushes out others of their kind, and never one that exists. Connections that exist are in plain
 * hashes: where those are full the new connection waits, and pkg/datapath/nat.go removes what is over.
 */
#ifndef SM_NAT_H
#define SM_NAT_H

#include "maps.h"

/* struct sm_nat.flags; pkg/datapath/nat.go has the same list. */
#define SM_NAT_SNAT (1u << 0)       /* the backend sees the node's address */
#define SM_NAT_ANSWERED (1u << 1)   /* the backend has sent something */
#define SM_NAT_FIN_CLIENT (1u << 2)
#define SM_NAT_FIN_BACKEND (1u << 3)
#define SM_NAT_RST_CLIENT (1u << 4)
#define SM_NAT_RST_BACKEND (1u << 5)
#define SM_NAT_DIRECT (1u << 6)     /* the client uses the backend's own address: see direct.h */

/* A connection by its middle form. */
struct sm_nat_key {
	__u8 client[16] SM_ALIGNED;
	__u8 backend[16] SM_ALIGNED;
	__u16 client_port; /* the client's own, unless the client uses it for two frontends that lead to this backend */
	__u16 backend_port;
	__u8 proto;
	__u8 pad[3];
};

struct sm_nat {
	__u8 front[16] SM_ALIGNED;
	__u8 node[16] SM_ALIGNED; /* whom the backend sees, if SM_NAT_SNAT */
	__u16 front_port;
	__u16 node_port;
	__u16 client_port; /* as the client knows it */
	__u16 flags;
	__u32 used;    /* seconds of ktime, a few late: see SM_NAT_COARSE */
	__u32 pool;    /* with backend: is that still a member? */
	__u32 backend;
	__u32 since;   /* seconds of ktime of the first packet */
};

/* A packet as it arrives: from the client to the frontend, or from the backend to the node. */
struct sm_nat_in_key {
	__u8 src[16] SM_ALIGNED;
	__u8 dst[16] SM_ALIGNED;
	__u16 sport;
	__u16 dport;
	__u8 proto;
	__u8 pad[3];
};

struct sm_nat_in {
	__u8 peer[16] SM_ALIGNED; /* the other end of the middle form: the backend for a client's packet, the client for a backend's */
	__u16 peer_port;
	__u16 own_port; /* of the packet's sender in the middle form */
	__u8 from_client;
	__u8 pad[3];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct sm_nat_key);
	__type(value, struct sm_nat);
} sm_nat SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 524288);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct sm_nat_in_key);
	__type(value, struct sm_nat_in);
} sm_nat_in SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 32768);
	__type(key, struct sm_nat_key);
	__type(value, struct sm_nat);
} sm_nat_new SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct sm_nat_in_key);
	__type(value, struct sm_nat_in);
} sm_nat_new_in SEC(".maps");

/* The ports of a datagram that travels in fragments, of which only the first carries them. */
struct sm_frag_key {
	__u8 src[16] SM_ALIGNED;
	__u8 dst[16] SM_ALIGNED;
	__u32 id;
	__u8 proto; /* which IPv4 identifies fragments by, IPv6 doesn't: 0 */
	__u8 pad[3];
};

struct sm_frag {
	__u16 sport;
	__u16 dport;
	__u8 proto;
	__u8 pad[3];
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct sm_frag_key);
	__type(value, struct sm_frag);
} sm_frags SEC(".maps");

/* Bits by port number, 64 to an entry: ports that some backend of an outside connection has, then, from SM_FRONT_PORTS on,
 * ports of outside frontends and of backends that clients use directly. They spare unrelated packets the look-ups. Bits are set
 * and never cleared. */
#define SM_FRONT_PORTS 1024

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2048);
	__type(key, __u32);
	__type(value, __u64);
} sm_nat_ports SEC(".maps");

/* The node's own addresses, for where the kernel can't say which one it prefers. */
struct sm_node {
	__u8 v4[16] SM_ALIGNED;
	__u8 v6[16] SM_ALIGNED;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sm_node);
} sm_node SEC(".maps");

struct sm_packet {
	struct sm_ip src;
	struct sm_ip dst;
	__u32 id;    /* of a fragmented datagram */
	__u16 sport;
	__u16 dport;
	__u16 l3;    /* offsets from the packet's start */
	__u16 l4;
	__u16 icmp;  /* of the ICMP header, where this is an error: l3 and l4 are then the quoted packet's */
	__u8 proto;
	__u8 tcp_flags;
	__u8 v4;
	__u8 first_fragment;
	__u8 later_fragment;
	__u8 frag_proto; /* see struct sm_frag_key */
};

/* What a program and its functions work on. Together it's more than a BPF stack holds, and the functions are verified one by
 * one, which needs their arguments to be plain. Per CPU; tc programs run with softirqs off and don't nest. */
struct sm_nat_work {
	struct sm_packet p;
	struct sm_ip to; /* arguments of sm_translate and sm_readdress_error */
	struct sm_nat_key name;
	struct sm_nat conn;
	struct sm_nat_in_key in_key;
	struct sm_nat_in in;
	struct sm_target target;
	__u64 fib[8]; /* struct bpf_fib_lookup, whose unions have no names for Go */
	__u32 nat_port_min;
	__u32 nat_ports;
	__u64 icmp_at; /* when the next refusal by ICMP is due: see sm_may_send_icmp */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sm_nat_work);
} nat_work SEC(".maps");

static __always_inline struct sm_nat_work *sm_work(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&nat_work, &zero);
}

static __always_inline bool sm_port_bit(__u32 base, __u16 port)
{
	__u32 index = base + (port >> 6);
	__u64 *word = bpf_map_lookup_elem(&sm_nat_ports, &index);

	return word && *word & (1ull << (port & 63));
}

static __always_inline void sm_set_port_bit(__u32 base, __u16 port)
{
	__u32 index = base + (port >> 6);
	__u64 *word = bpf_map_lookup_elem(&sm_nat_ports, &index), bit = 1ull << (port & 63);

	if (word && !(*word & bit))
		__sync_fetch_and_or(word, bit);
}

#endif
