/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The refusal that a client outside gets where a frontend has no backend: a TCP reset or an ICMP "port unreachable", made of
 * the very packet that is refused and sent back by the device that it came by.
 *
 * A TCP segment that belongs to no connection that is known is answered so too, so that a client doesn't talk into the void.
 * Resets are no longer than what they answer, so nobody gains by asking for them; ICMP is limited, as the kernel does it.
 * Packets with IP options or extension headers are dropped instead: nobody opens a connection with those.
 */
#ifndef SM_REFUSE_H
#define SM_REFUSE_H

#include "packet.h"

#define SM_ICMP_PER_SECOND 1000 /* per CPU */
#define SM_ICMP_BURST 50

#define ETH_ALEN 6
#define ICMP_PORT_UNREACHABLE 3
#define ICMP6_UNREACHABLE 1
#define ICMP6_PORT_UNREACHABLE 4

#define CHECKSUM_PARTIAL 3

/* Is the transport checksum still to be filled in, by the device? Then the field holds the sum over the pseudo header. */
static __always_inline bool sm_partial(struct __sk_buff *skb)
{
	struct sk_buff *kernel = (void *)skb;

	return BPF_CORE_READ_BITFIELD_PROBED(kernel, ip_summed) == CHECKSUM_PARTIAL;
}

static __always_inline __u16 sm_fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* Sums words in network order; n is a constant multiple of 4. */
#define SM_SUM(from, n, seed) bpf_csum_diff(NULL, 0, (__be32 *)(from), n, seed)

/* What precedes TCP, UDP and ICMPv6 checksums: of the answer, which goes from the packet's destination to its source. */
static __always_inline __u32 sm_pseudo_sum(const struct sm_packet *p, __u8 proto, __u32 length)
{
	__be32 tail[2] = { bpf_htonl(length), bpf_htonl(proto) };
	__be32 addrs[8] = {};
	__u32 sum = SM_SUM(tail, sizeof(tail), 0);

	if (p->v4) {
		addrs[0] = p->dst.word[3];
		addrs[1] = p->src.word[3];
	} else {
		*(struct sm_ip *)addrs = p->dst;
		*(struct sm_ip *)(addrs + 4) = p->src;
	}
	return SM_SUM(addrs, sizeof(addrs), sum);
}

/* Writes the Ethernet and IP headers of the answer; payload is what follows the IP header. */
static __always_inline int sm_answer_headers(struct __sk_buff *skb, const struct sm_packet *p, __u8 proto, __u32 payload)
{
	__u8 mac[2 * ETH_ALEN], swapped[2 * ETH_ALEN];

	if (sm_nat_l2) {
		if (bpf_skb_load_bytes(skb, 0, mac, sizeof(mac)))
			return -1;
		__builtin_memcpy(swapped, mac + ETH_ALEN, ETH_ALEN);
		__builtin_memcpy(swapped + ETH_ALEN, mac, ETH_ALEN);
		if (bpf_skb_store_bytes(skb, 0, swapped, sizeof(swapped), 0))
			return -1;
	}
	if (p->v4) {
		struct iphdr ip = {
			.version = 4, .ihl = 5, .tot_len = bpf_htons(sizeof(ip) + payload), .frag_off = bpf_htons(0x4000), .ttl = 64,
			.protocol = proto, .saddr = p->dst.word[3], .daddr = p->src.word[3],
		};

		ip.check = ~sm_fold(SM_SUM(&ip, sizeof(ip), 0));
		return bpf_skb_store_bytes(skb, sm_nat_l2, &ip, sizeof(ip), 0);
	} else {
		struct ipv6hdr ip = { .version = 6, .payload_len = bpf_htons(payload), .nexthdr = proto, .hop_limit = 64 };

		*(struct sm_ip *)&ip.saddr = p->dst;
		*(struct sm_ip *)&ip.daddr = p->src;
		return bpf_skb_store_bytes(skb, sm_nat_l2, &ip, sizeof(ip), 0);
	}
}

static __always_inline int sm_reset(struct __sk_buff *skb, const struct sm_packet *p)
{
	__u32 length = skb->len - p->l4, head;
	struct tcphdr was, tcp = {};
	__u32 sum;

	if (bpf_skb_load_bytes(skb, p->l4, &was, sizeof(was)) || was.rst)
		return -1;
	head = was.doff * 4;
	tcp.source = was.dest;
	tcp.dest = was.source;
	tcp.doff = 5;
	tcp.rst = 1;
	if (was.ack) {
		tcp.seq = was.ack_seq;
	} else {
		tcp.ack = 1;
		tcp.ack_seq = bpf_htonl(bpf_ntohl(was.seq) + was.syn + was.fin + (length > head ? length - head : 0));
	}
	if (bpf_skb_change_tail(skb, p->l4 + sizeof(tcp), 0) || sm_answer_headers(skb, p, IPPROTO_TCP, sizeof(tcp)))
		return -1;
	sum = sm_pseudo_sum(p, IPPROTO_TCP, sizeof(tcp));
	tcp.check = sm_partial(skb) ? sm_fold(sum) : ~sm_fold(SM_SUM(&tcp, sizeof(tcp), sum));
	return bpf_skb_store_bytes(skb, p->l4, &tcp, sizeof(tcp), 0);
}

/* Quotes the IP and the UDP header. */
static __always_inline int sm_unreachable(struct __sk_buff *skb, const struct sm_packet *p)
{
	__u32 l3 = sm_nat_l2, ip = p->v4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	__u32 sum, type = p->v4 ? ICMP_UNREACHABLE << 8 | ICMP_PORT_UNREACHABLE : ICMP6_UNREACHABLE << 8 | ICMP6_PORT_UNREACHABLE;
	__u8 quoted[sizeof(struct ipv6hdr)] __attribute__((aligned(8))) = {};
	struct {
		__be16 type;
		__be16 check;
		__be32 unused;
	} icmp = { .type = bpf_htons(type) };
	struct udphdr udp;

	if (bpf_skb_load_bytes(skb, p->l4, &udp, sizeof(udp)))
		return -1;
	if (p->v4 ? bpf_skb_load_bytes(skb, l3, quoted, sizeof(struct iphdr)) : bpf_skb_load_bytes(skb, l3, quoted, sizeof(struct ipv6hdr)))
		return -1;
	if (bpf_skb_change_tail(skb, p->l4 + sizeof(udp), 0) || bpf_skb_adjust_room(skb, ip + sizeof(icmp), BPF_ADJ_ROOM_MAC, 0))
		return -1;
	if (sm_answer_headers(skb, p, p->v4 ? IPPROTO_ICMP : IPPROTO_ICMPV6, sizeof(icmp) + ip + sizeof(udp)))
		return -1;
	sum = p->v4 ? 0 : sm_pseudo_sum(p, IPPROTO_ICMPV6, sizeof(icmp) + ip + sizeof(udp));
	sum = SM_SUM(quoted, sizeof(quoted), sum); /* zeros behind an IPv4 header */
	/* Where the quoted checksum is still to be filled in it will be, and makes up for all the rest that it covers. */
	if (sm_partial(skb))
		sum = sm_fold(sum) + (__u16)~udp.check;
	else
		sum = SM_SUM(&udp, sizeof(udp), sum);
	icmp.check = ~sm_fold((__u64)sm_fold(sum) + icmp.type);
	return bpf_skb_store_bytes(skb, l3 + ip, &icmp, sizeof(icmp), 0);
}

/* May this CPU send another ICMP error now? */
static __always_inline bool sm_may_send_icmp(struct sm_nat_work *w)
{
	__u64 now = bpf_ktime_get_ns(), step = 1000000000ull / SM_ICMP_PER_SECOND, earliest = now - SM_ICMP_BURST * step;

	if (w->icmp_at < earliest)
		w->icmp_at = earliest;
	if (w->icmp_at + step > now)
		return false;
	w->icmp_at += step;
	return true;
}

/* Answers the packet with a refusal; the program's verdict. */
__noinline int sm_refuse_packet(struct __sk_buff *skb)
{
	struct sm_nat_work *w = sm_work();
	const struct sm_packet *p;
	int err;

	if (!w)
		return SM_DROP;
	p = &w->p;
	if (p->first_fragment || p->l4 != p->l3 + (p->v4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr)))
		return SM_DROP;
	if (p->proto == IPPROTO_TCP)
		err = sm_reset(skb, p);
	else
		err = sm_may_send_icmp(w) ? sm_unreachable(skb, p) : -1;
	return err ? SM_DROP : bpf_redirect(skb->ifindex, 0);
}

#endif
