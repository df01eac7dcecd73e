/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Types and small helpers that all hooks share.
 *
 * One address path: IPv4, IPv6 and v4-mapped IPv6 are all 16 bytes here, so that a dual-stack socket and a plain
 * IPv4 one meet under the same key. Ports are in host order everywhere except in the kernel's own context fields,
 * where sockops and sk_msg mix both orders: only the functions of this file and of pairs.h read those.
 */
#ifndef SM_COMMON_H
#define SM_COMMON_H

#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2
#define AF_INET6 10
#define EADDRINUSE 98
#define ECONNREFUSED 111
#define O_NONBLOCK 04000
#define SOL_IP 0
#define SOL_IPV6 41
#define SO_ORIGINAL_DST 80 /* IP6T_SO_ORIGINAL_DST is the same number */

/* Verdicts of the cgroup hooks. */
#define SM_DENY 0
#define SM_ALLOW 1

/* struct sm_config.flags */
#define SM_ACCELERATE (1u << 0)
#define SM_SERVICES (1u << 1)
#define SM_FAIL_CLOSED (1u << 2)
#define SM_ACCELERATE_PODS (1u << 3)
#define SM_CLAIMS_EXACT (1u << 4)    /* some claim names an address */
#define SM_CLAIMS_PORT (1u << 5)     /* some claim takes a port of every address */
#define SM_CLAIMS_CATCHALL (1u << 6) /* some claim takes what is left */
#define SM_OUTSIDE (1u << 7)         /* sm_outside isn't empty */
#define SM_LOOPBACK_PORTS (1u << 8)  /* some frontend is a loopback address, for the host's own network namespace */
#define SM_PATIENT (1u << 10)        /* there are more processors than one: who waits for another does not keep it from running */
#define SM_FOREIGN (1u << 9)         /* whatever listens on the proxy's port in a pod is its proxy */

/* struct sm_target.mode */
#define SM_MODE_SERVICE 1
#define SM_MODE_PROXY 2
#define SM_MODE_OFFLOAD 3

/* struct sm_target.flags */
#define SM_TARGET_MEMBERS (1u << 0) /* sm_members lists the pool's backends: clients or sockets stick to one */
#define SM_TARGET_LOCAL (1u << 1)   /* outside: backends are on this node and see the client's own address */
#define SM_TARGET_SILENT (1u << 2)  /* outside: without backends there is no answer, not a refusal */
#define SM_TARGET_SOURCES (1u << 3) /* outside: only clients in sm_sources may come, others get no answer */

/* struct sm_netns.flags and struct sm_local.flags */
#define SM_ENROLLED (1u << 0)
#define SM_BLOCKING_OK (1u << 1) /* accelerate blocking sockets too */

/* struct sm_sock.role: what the socket is in a connection that we touched. pkg/datapath has the same list. */
enum sm_role {
	SM_ROLE_NONE,
	SM_ROLE_CLIENT,     /* an application's socket, redirected to the proxy */
	SM_ROLE_DOWNSTREAM, /* the proxy's accepted socket */
	SM_ROLE_UPSTREAM,   /* the proxy's socket towards an endpoint */
	SM_ROLE_SERVER,     /* an application's accepted socket behind the proxy */
	SM_ROLE_SERVICE,    /* translated from a Service address to a backend */
	SM_ROLE_OFFLOAD,    /* sent to an endpoint of an offloaded listener */
	SM_ROLE_POD_CLIENT, /* pod to pod without proxy, connecting side */
	SM_ROLE_POD_SERVER, /* pod to pod without proxy, accepting side */
	SM_ROLE_OURS,       /* made by the agent, which said so before it used it: a listener, or an upstream socket to be */
};

/* struct sm_sock.state */
enum sm_state {
	SM_PLAIN,    /* ordinary TCP */
	SM_WANTED,   /* to be enrolled when the handshake ends */
	SM_ENROLLED_STATE, /* in sm_pairs */
	SM_REMOVED,  /* was in sm_pairs, left again before anything was redirected */
};

/* struct sm_sock.latch: what happens to the bytes that this socket sends, fixed at its first message */
enum sm_latch {
	SM_UNDECIDED,
	SM_REDIRECT,
	SM_PASS,
};

/* struct sm_sock.reason: why the bytes aren't redirected. pkg/datapath spells them out. */
enum sm_reason {
	SM_WHY_NONE,
	SM_WHY_OFF,          /* acceleration is switched off */
	SM_WHY_BLOCKING,     /* a blocking read on a sockmap socket may return EAGAIN: kernel.md 22 */
	SM_WHY_MPTCP,        /* sockmap and MPTCP don't mix */
	SM_WHY_REMOTE,       /* the other end is not a pod of this node */
	SM_WHY_ENROL_FAILED, /* the kernel refused the socket; sm_sock.error has the errno */
	SM_WHY_PEER_PLAIN,   /* the other end could not be enrolled */
	SM_WHY_LATE,         /* the first bytes left before the other end was there */
	SM_WHY_PEER_MISSING, /* the other end was not found at the first message */
	SM_WHY_PEER_GONE,    /* the other end has closed since */
	SM_WHY_SLOW_READER,  /* the other end left too much unread */
	SM_WHY_SPLICE,       /* this application splices the socket, and splice(2) never sees redirected bytes */
	SM_WHY_PEER_SPLICES, /* the application at the other end does */
};

/* struct sm_sock.aside: the proxy steps aside, and the bytes that this socket sends skip it. aside.h explains. */
enum sm_aside_state {
	SM_ASIDE_NONE,  /* they go to the other end of the connection */
	SM_ASIDE_ARMED, /* they do, until nothing of them is under way in the proxy */
	SM_ASIDE_ON,    /* they go straight to the far application's socket */
	SM_ASIDE_OVER,  /* they did, and won't any more */
};

/* struct sm_sock.aside_reason: why not. pkg/datapath spells them out. */
enum sm_aside_why {
	SM_ASIDE_OK,
	SM_ASIDE_NEAR_PLAIN,  /* the sender is not enrolled */
	SM_ASIDE_FAR_PLAIN,   /* the receiver is not */
	SM_ASIDE_BY_TCP,      /* the direction has gone by TCP */
	SM_ASIDE_TAKEN,       /* the sender was handed over before */
	SM_ASIDE_SLOW_READER, /* back in the proxy, until the receiver has read */
	SM_ASIDE_SPLICES,     /* the receiver's application splices */
	SM_ASIDE_FAR_GONE,    /* the receiver has closed */
	SM_ASIDE_ENDED,       /* the proxy has ended the connection */
	SM_ASIDE_MEMORY,      /* the receiver's memory is short: its kernel might refuse bytes that are counted already */
};

/* Addresses are bytes so that dumps are readable, and aligned so that they move as words. */
#define SM_ALIGNED __attribute__((aligned(4)))

struct sm_config {
	__u32 flags;
	__u32 pad0;
	__u16 proxy_port;
	__u16 pad;
	__u32 layout;
	__u32 backlog_limit; /* memory that redirected messages may hold unread, per direction: see skmsg.bpf.c */
	__u32 pad2;
	__u64 owner; /* the agent that opened the maps last; others stop writing */
	__u64 host_netns; /* cookie of the node's own network namespace */
	__u16 nat_port_min; /* source ports that outside clients' connections get on their way to backends */
	__u16 nat_port_max;
	__u32 pad3;
};

struct sm_frontend_key {
	__u8 addr[16] SM_ALIGNED;
	__u16 port;
	__u8 proto;
	__u8 pad;
};

struct sm_claim_key {
	__u8 addr[16] SM_ALIGNED; /* unspecified: every address of that family */
	__u16 port;    /* 0 with an unspecified address: whatever is not claimed otherwise */
	__u16 pad;
};

/* Where a frontend or a claim leads. One update of this value moves new connections from one complete set of slots
 * to the next: the slots of the new generation are written before, those of the old one deleted afterwards. */
struct sm_target {
	__u32 pool;       /* owns the slots {pool, generation, 0..slots-1}; never used again for another address */
	__u32 generation;
	__u32 slots;      /* 0: refuse */
	__u16 mode;
	__u16 flags;
	__u64 weight;     /* sum over the slots' weights; 1: all are equal, and no second draw is needed */
	__u32 affinity_seconds;
	__u32 pad;
};

struct sm_slot_key {
	__u32 pool;
	__u32 generation;
	__u32 slot;
};

/* One column of an alias table (Walker, Vose): draw a column evenly, then keep its own backend with probability
 * keep/weight, else take the other. Exact for integer weights, and one look-up however many endpoints there are. */
struct sm_slot {
	__u64 keep;
	__u32 backend; /* 0: refuse */
	__u32 other;
};

struct sm_backend {
	__u8 addr[16] SM_ALIGNED;
	__u16 port;
	__u16 pad;
};

/* A backend that takes new connections of a pool now. Only pools with SM_TARGET_MEMBERS have these entries: what sticks
 * to a backend, a client by affinity or a UDP socket, asks here whether that one is still good. */
struct sm_member_key {
	__u32 pool;
	__u32 backend;
};

/* Who stays with which backend. Inside, the client is a network namespace (its cookie in the first 8 bytes, since at
 * connect time there is no source address yet); outside it is the address. */
struct sm_affinity_key {
	__u32 pool;
	__u32 pad;
	__u8 client[16] __attribute__((aligned(8)));
};

struct sm_affinity {
	__u32 used; /* second (ktime) of the last connection or datagram: use refreshes */
	__u32 backend;
} __attribute__((aligned(8))); /* changes as one word */

/* Where one UDP socket's datagrams to one Service address go. */
struct sm_udp_flow {
	__u8 front[16] SM_ALIGNED;
	__u8 addr[16] SM_ALIGNED; /* the backend's */
	__u16 front_port;         /* 0: nothing here */
	__u16 port;
	__u32 pool;
	__u32 backend;
	__u32 used;   /* the socket's count of uses: of two flows to one backend the later one gets its answers */
	__u32 direct; /* the socket has sent to the backend's own address since */
};

#define SM_UDP_FLOWS 4

/* What a UDP socket that talks to Services remembers; dies with it. */
struct sm_udp {
	struct bpf_spin_lock lock;
	__u32 uses;
	__u32 spilled; /* sm_udp_more has something of this socket */
	struct sm_udp_flow flows[SM_UDP_FLOWS];
};

/* What finds no room in the socket's storage: flows by the Service's address, and answers by the backend's. */
struct sm_udp_key {
	__u64 cookie;
	__u8 addr[16] SM_ALIGNED;
	__u16 port;
	__u8 answers;
	__u8 pad[5];
};

/* Ranges of clients that may use a restricted frontend, by its pool; prefixlen counts the pool's 32 bits, and 96 more for
 * IPv4. */
struct sm_source_key {
	__u32 prefixlen;
	__u32 pool;
	__u8 addr[16] SM_ALIGNED;
};

struct sm_netns {
	__u32 flags;
	__u32 pad;
};

struct sm_local {
	__u64 netns;
	__u32 flags;
	__u32 pad;
};

/* Both ends of one TCP connection as one of the two sees them. netns is the cookie where an address is loopback,
 * else 0: pod addresses are unique on a node, loopback tuples aren't. */
struct sm_tuple {
	__u8 local[16] SM_ALIGNED;
	__u8 remote[16] SM_ALIGNED;
	__u64 netns;
	__u16 local_port;
	__u16 remote_port;
	__u32 pad;
};

/* Handed from the connecting socket to the accepting one when the handshake ends. */
struct sm_origin {
	__u8 addr[16] SM_ALIGNED;
	__u16 port;
	__u8 role; /* of the connecting socket */
	__u8 accelerate;
	__u32 claim; /* SM_OPEN, then decided once by compare-and-swap */
};

#define SM_OPEN 0
#define SM_TAKEN 1 /* the accepting side enrols itself */
#define SM_LATE 2  /* the connecting side has sent its first bytes by TCP already */
#define SM_REFUSED 3 /* the accepting side can't be enrolled */

struct sm_sock {
	__u8 origin[16] SM_ALIGNED;
	__u64 netns;
	__u64 redirected_bytes; /* sent by this socket, socket to socket */
	__u64 passed_bytes;     /* sent by this socket, by TCP, while enrolled */
	__u32 backend;
	__u32 pool; /* UDP: the socket may stay with the backend while that is a member of it */
	__u16 origin_port;
	__u8 role;
	__u8 state;
	__u8 latch;
	__u8 reason;
	__s16 error;
	__u32 window_bytes; /* since the last look at the other end's backlog: see skmsg.bpf.c */
	__u32 window_messages;
	__u32 smallest_mean;
	/* What follows is explained in aside.h. */
	__u32 aside;      /* enum sm_aside_state */
	__u32 aside_slot;
	__u32 aside_rest; /* of the last message that went past the proxy as part of a body, what was cut off for the next verdict */
	struct sm_tuple route; /* the socket's own key in sm_pairs; the far socket's from SM_ASIDE_ARMED on */
	__u64 aside_bytes;     /* of redirected_bytes, those that skipped the proxy */
	__u64 aside_token;
	__u64 aside_far;       /* the far socket in the kernel; before the hand-over, the other end's, once known */
	__u64 aside_tcp_bytes; /* sent by TCP */
	__u32 aside_tcp_seq;   /* up to where those are counted */
	__u8 aside_reason;     /* enum sm_aside_why */
	__u8 tcp_counted;      /* what it sends by TCP is known from its first byte on */
	__u8 ahead;            /* enum sm_ahead: see patience.h */
	__u8 aside_part;       /* the last message went past the proxy as part of a body */
};

/* One direction of a connection that the proxy hands over, shared between the kernel and the proxy's memory. A cache
 * line, because two processors write to the two directions. */
struct sm_aside_dir {
	__u64 token;     /* whose it is; 0: nobody's. Written by the proxy, as is the next: */
	__u64 forwarded; /* bytes of the sender that the proxy's far socket has taken */
	__u64 relay;     /* that socket, in the kernel */
	__u64 carried;   /* bytes that have skipped the proxy. Written by sm_msg, as is the next: */
	__u64 last;      /* when the last one did: CLOCK_MONOTONIC_COARSE */
	__u64 budget;    /* up to which of the sender's bytes may skip the proxy: see body.h. Written by the proxy */
	__u64 rested;    /* how long the sender may wait for the proxy, as a time on the clock: see patience.h */
	__u32 desk;      /* where a sender that waits says so. Written by the proxy */
	__u32 seen;      /* of a connection, in the first of the two: has either begun? Of bodies: the last's budget, if that has */
};

/* Where senders that wait for a loop of the proxy call it, so that it serves them first: see patience.h. */
struct sm_aside_desk {
	__u32 call; /* 1 + the slot of a direction whose sender waits; 0: nobody calls, or the loop has heard it */
	__u32 beat; /* changes while somebody calls and the loop is busy with others */
	__u32 pad[14]; /* a cache line, because the loop looks here all the time */
};

#define SM_ASIDE_DESKS 256
#define SM_NO_BUDGET (~0ull) /* all bytes, to the end of the connection */

/* What the proxy asks of sm_step_aside. The first bytes are taken for an Ethernet header. */
struct sm_aside_request {
	__u8 header[16];
	struct sm_tuple down; /* the proxy's sockets, by their own keys */
	struct sm_tuple up;
	__u64 token;
	__u32 slot; /* of the direction from the client; the next one is the other's */
	__u32 pad;
};

/* Outcomes. Connections are counted at connect, bytes at each message. */
struct sm_counters {
	__u64 proxied;
	__u64 offloaded;
	__u64 service;
	__u64 passed;
	__u64 refused;
	__u64 fail_open;
	__u64 fail_closed;
	__u64 origin_missing;
	__u64 origin_full;
	__u64 enrolled;
	__u64 enrol_failed;
	__u64 late;
	__u64 skipped_blocking;
	__u64 skipped_mptcp;
	__u64 turned_blocking;
	__u64 peer_missing;
	__u64 peer_gone;
	__u64 slow_reader;
	__u64 redirected_messages;
	__u64 redirected_bytes;
	__u64 passed_messages;
	__u64 passed_bytes;
	__u64 pool_retries;
	__u64 storage_failed;
	__u64 spliced;          /* sockets that an application was seen to splice while they were enrolled */
	__u64 skipped_splicing; /* sockets that were not enrolled because their application splices */
	__u64 stepped_aside;    /* connections of which a direction has skipped the proxy */
	__u64 aside_directions; /* times that a direction began to skip the proxy */
	__u64 aside_returned;   /* times that one came back because its receiver was slow */
	__u64 aside_messages;
	__u64 aside_bytes;
	__u64 outside;           /* connections of clients outside */
	__u64 outside_refused;   /* answered with a refusal: no backend */
	__u64 outside_silent;    /* left without an answer: backends are on other nodes */
	__u64 outside_denied;    /* left without an answer: not in the source ranges */
	__u64 outside_stray;     /* segments of connections that are not known (any more) */
	__u64 outside_full;      /* packets that waited for room in sm_nat */
	__u64 outside_no_port;   /* connections for which no source port was free */
	__u64 outside_no_source; /* connections for which the node has no address */
	__u64 outside_errors;    /* ICMP errors translated */
	__u64 udp_repicked;     /* flows of UDP sockets that went to another backend because theirs was gone */
	__u64 bind_refused;     /* attempts to take the proxy's port beside its listener */
	__u64 aside_bodies;     /* bodies of messages of which a part has skipped the proxy */
	__u64 aside_body_bytes; /* of aside_bytes, theirs */
};

/* An application that splices: whoever accepts on a port of a network namespace, or what connects from a container. */
struct sm_app {
	__u64 netns;
	__u64 cgroup; /* 0: the accepting side */
	__u16 port;   /* 0: the connecting side */
	__u16 pad;
	__u32 pad2;
};

struct sm_spliced {
	__u64 seen; /* ktime */
	__u64 sk;   /* the kernel's socket, to look at what it has unread */
};

/* One splice on an enrolled socket, for the agent: see splice.bpf.c. */
struct sm_splice_event {
	struct sm_tuple self;
	struct sm_app app;
	__u64 cookie;
	__u8 role;
	__u8 pad[7];
};

/* An address while it's being worked with. */
struct sm_ip {
	__be32 word[4];
};

static __always_inline struct sm_ip sm_mapped(__be32 v4)
{
	struct sm_ip ip = { .word = { 0, 0, bpf_htonl(0xffff), v4 } };

	return ip;
}

static __always_inline void sm_store(__u8 *to, const struct sm_ip *ip)
{
	*(struct sm_ip *)to = *ip;
}

static __always_inline struct sm_ip sm_load(const __u8 *from)
{
	return *(const struct sm_ip *)from;
}

static __always_inline bool sm_is_v4(const struct sm_ip *ip)
{
	return !ip->word[0] && !ip->word[1] && ip->word[2] == bpf_htonl(0xffff);
}

static __always_inline bool sm_is_loopback(const struct sm_ip *ip)
{
	if (sm_is_v4(ip))
		return (ip->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !ip->word[0] && !ip->word[1] && !ip->word[2] && ip->word[3] == bpf_htonl(1);
}

static __always_inline bool sm_is_link_local6(const struct sm_ip *ip)
{
	return (ip->word[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

#endif
