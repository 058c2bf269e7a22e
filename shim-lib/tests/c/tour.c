/* A tour of the verbs interface on one device, two connected RC QPs in one process. Prints what the library answered,
 * leaving out numbers that differ from run to run: with and without the shim the output must be the same.
 *
 * usage: tour GID-INDEX [creds]     "creds": change the process' credentials after opening the device, as CRIU's
 * restore does to every thread; without the shim Soft-RoCE's doorbell then fails. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <grp.h>
#include <infiniband/verbs.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define SAY(...) (printf(__VA_ARGS__), fflush(stdout))
#define NEED(x) do { if (!(x)) { SAY("FAILED line %d: %s: %s\n", __LINE__, #x, strerror(errno)); exit(1); } } while (0)

static struct ibv_context *ctx;
static struct ibv_pd *pd;
static union ibv_gid gid;
static int gid_index;
static char *buf;
static struct ibv_mr *mr;
enum { SIZE = 1 << 16, HALF = SIZE / 2 };

static struct ibv_qp *make(struct ibv_cq *scq, struct ibv_cq *rcq, struct ibv_srq *srq, int sig_all, void *tag)
{
	struct ibv_qp_init_attr a = {
		.qp_context = tag, .send_cq = scq, .recv_cq = rcq, .srq = srq, .qp_type = IBV_QPT_RC, .sq_sig_all = sig_all,
		.cap = { .max_send_wr = 16, .max_recv_wr = srq ? 0 : 16, .max_send_sge = 4, .max_recv_sge = 4, .max_inline_data = 64 },
	};
	struct ibv_qp *qp = ibv_create_qp(pd, &a);
	NEED(qp);
	SAY("qp: caps %u %u %u %u %u, context %d, cqs %d, srq %d, pd %d, state %d\n", a.cap.max_send_wr, a.cap.max_recv_wr,
	    a.cap.max_send_sge, a.cap.max_recv_sge, a.cap.max_inline_data, qp->qp_context == tag,
	    qp->send_cq == scq && qp->recv_cq == rcq, qp->srq == srq, qp->pd == pd, qp->state);
	return qp;
}

static void up(struct ibv_qp *qp, struct ibv_qp *to)
{
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_INIT, .port_num = 1,
		.qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC };
	NEED(!ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
	a = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_1024, .dest_qp_num = to->qp_num, .rq_psn = 7,
		.max_dest_rd_atomic = 4, .min_rnr_timer = 12,
		.ah_attr = { .is_global = 1, .port_num = 1, .grh = { .dgid = gid, .sgid_index = gid_index, .hop_limit = 4 } } };
	NEED(!ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
			    IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER));
	a = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTS, .timeout = 18, .retry_cnt = 7, .rnr_retry = 7, .sq_psn = 7, .max_rd_atomic = 4 };
	NEED(!ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
			    IBV_QP_MAX_QP_RD_ATOMIC));
	struct ibv_qp_init_attr i;
	NEED(!ibv_query_qp(qp, &a, IBV_QP_STATE | IBV_QP_DEST_QPN | IBV_QP_AV | IBV_QP_CAP, &i));
	SAY("up: state %d %d, dest %d, gid %d, sgid %d, init %d %d %d, psn %u %u, caps %u %u\n", a.qp_state, qp->state,
	    a.dest_qp_num == to->qp_num, !memcmp(&a.ah_attr.grh.dgid, &gid, 16), a.ah_attr.grh.sgid_index == gid_index,
	    i.send_cq == qp->send_cq, i.recv_cq == qp->recv_cq, i.qp_context == qp->qp_context, a.rq_psn, a.sq_psn,
	    i.cap.max_send_wr, i.cap.max_recv_wr);
}

static int next(struct ibv_cq *cq, struct ibv_wc *wc)
{
	for (int i = 0; i < 20000; i++) {
		int n = ibv_poll_cq(cq, 1, wc);
		if (n)
			return n;
		usleep(200);
	}
	return 0;
}

static void expect(struct ibv_cq *cq, const char *what, struct ibv_qp *qp)
{
	struct ibv_wc wc;
	int n = next(cq, &wc);
	SAY("%s: n %d", what, n);
	if (n == 1)
		SAY(" wr_id %lu status %d%s", (unsigned long)wc.wr_id, wc.status, wc.qp_num == qp->qp_num ? "" : " WRONG QP");
	if (n == 1 && !wc.status)
		SAY(" opcode %d len %u flags %u imm %u", wc.opcode, wc.opcode & 128 ? wc.byte_len : 0, wc.wc_flags,
		    wc.wc_flags & IBV_WC_WITH_IMM ? ntohl(wc.imm_data) : 0);
	SAY("\n");
}

static struct ibv_sge sge(int at, int len) { return (struct ibv_sge){ (uintptr_t)buf + at, len, mr->lkey }; }

static int post(struct ibv_qp *qp, unsigned long id, int op, int flags, int at, int len, int to)
{
	struct ibv_sge s = sge(at, len);
	struct ibv_send_wr wr = { .wr_id = id, .sg_list = &s, .num_sge = len ? 1 : 0, .opcode = op, .send_flags = flags, .imm_data = htonl(id) }, *bad = NULL;
	if (op == IBV_WR_ATOMIC_FETCH_AND_ADD || op == IBV_WR_ATOMIC_CMP_AND_SWP) {
		wr.wr.atomic.remote_addr = (uintptr_t)buf + to; wr.wr.atomic.rkey = mr->rkey;
		wr.wr.atomic.compare_add = 5; wr.wr.atomic.swap = 9;
	} else { wr.wr.rdma.remote_addr = (uintptr_t)buf + to; wr.wr.rdma.rkey = mr->rkey; }
	int r = ibv_post_send(qp, &wr, &bad);
	if (r)
		SAY("post %lu: %d bad %d\n", id, r, bad == &wr);
	return r;
}

static int post_recv(struct ibv_qp *qp, struct ibv_srq *srq, unsigned long id, int at, int len)
{
	struct ibv_sge s = sge(at, len);
	struct ibv_recv_wr wr = { .wr_id = id, .sg_list = &s, .num_sge = 1 }, *bad = NULL;
	int r = srq ? ibv_post_srq_recv(srq, &wr, &bad) : ibv_post_recv(qp, &wr, &bad);
	if (r)
		SAY("recv %lu: %d bad %d\n", id, r, bad == &wr);
	return r;
}

static void destroy(struct ibv_qp *a, struct ibv_qp *b, struct ibv_cq *cq)
{
	int r = ibv_destroy_qp(a), s = ibv_destroy_qp(b);
	SAY("destroy %d %d %d\n", r, s, ibv_destroy_cq(cq));
}

static void traffic(void)
{
	struct ibv_cq *cq = ibv_create_cq(ctx, 40, &gid, NULL, 0);
	NEED(cq);
	SAY("cq: cqe %d context %d\n", cq->cqe, cq->cq_context == &gid);
	struct ibv_qp *a = make(cq, cq, NULL, 0, &gid), *b = make(cq, cq, NULL, 1, NULL);
	up(a, b);
	up(b, a);
	for (int i = 0; i < 8; i++)
		post_recv(b, NULL, 100 + i, HALF + i * 64, 64);
	strcpy(buf, "hello, wire");
	post(a, 1, IBV_WR_SEND, IBV_SEND_SIGNALED, 0, 12, 0);
	struct ibv_wc wc;
	next(cq, &wc), next(cq, &wc);
	SAY("got '%s'\n", buf + HALF);
	post(a, 2, IBV_WR_SEND_WITH_IMM, 0, 0, 12, 0);
	expect(cq, "imm", b);
	post(a, 3, IBV_WR_RDMA_WRITE_WITH_IMM, 0, 0, 12, 4096);
	expect(cq, "write imm", b);
	SAY("wrote '%s'\n", buf + 4096);
	strcpy(buf, "inline");
	post(a, 4, IBV_WR_SEND, IBV_SEND_SIGNALED | IBV_SEND_INLINE, 0, 7, 0);
	memset(buf, 'x', 7);
	next(cq, &wc), next(cq, &wc);
	SAY("inline '%s'\n", buf + HALF + 3 * 64);
	*(unsigned long *)(buf + 8192) = 5;
	post(a, 5, IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_SEND_SIGNALED, 0, 8, 8192);
	expect(cq, "fetch add", a);
	SAY("was %lu is %lu\n", *(unsigned long *)buf, *(unsigned long *)(buf + 8192));
	post(a, 6, IBV_WR_ATOMIC_CMP_AND_SWP, IBV_SEND_SIGNALED, 0, 8, 8192);
	expect(cq, "cmp swap", a);
	post(a, 7, IBV_WR_RDMA_READ, IBV_SEND_SIGNALED, 0, 8, 8192);
	expect(cq, "read", a);
	SAY("read %lu\n", *(unsigned long *)buf);
	/* lists, and what is wrong in the middle of one */
	struct ibv_sge s[5] = { sge(0, 4), sge(64, 4), sge(128, 4), sge(192, 4), sge(256, 4) };
	struct ibv_send_wr l[3] = { { .wr_id = 20, .next = &l[1], .sg_list = s, .num_sge = 4, .opcode = IBV_WR_SEND },
		{ .wr_id = 21, .next = &l[2], .sg_list = s, .num_sge = 5, .opcode = IBV_WR_SEND, .send_flags = IBV_SEND_SIGNALED },
		{ .wr_id = 22, .sg_list = s, .num_sge = 1, .opcode = IBV_WR_SEND, .send_flags = IBV_SEND_SIGNALED } }, *bad = NULL;
	int r1 = ibv_post_send(a, l, &bad);
	SAY("list with five sges: %d, bad is the second %d\n", r1, bad == &l[1]);
	expect(cq, "its first", b);
	/* 12 unsignalled, 1 signalled */
	for (int i = 0; i < 12; i++)
		post(a, 30 + i, IBV_WR_RDMA_WRITE, 0, 0, 4, 4096);
	post(a, 42, IBV_WR_RDMA_WRITE, IBV_SEND_SIGNALED, 0, 4, 4096);
	expect(cq, "thirteenth write", a);
	int full = 0;
	for (int i = 0; i < 64 && !(full = post_recv(b, NULL, 200 + i, HALF, 64)); i++)
		;
	SAY("receive queue full: %d\n", full);
	/* a bad rkey breaks the connection: errors on both sides, flushes */
	struct ibv_send_wr w = { .wr_id = 50, .sg_list = s, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE, .send_flags = IBV_SEND_SIGNALED };
	w.wr.rdma.remote_addr = (uintptr_t)buf; w.wr.rdma.rkey = mr->rkey ^ 0x5500;
	SAY("bad rkey: post %d\n", ibv_post_send(a, &w, &bad));
	int flushed = 0, refused = 0;
	for (int i = 0; i < 200; i++) {
		while (ibv_poll_cq(cq, 1, &wc) > 0)
			flushed += wc.status == IBV_WC_WR_FLUSH_ERR, refused += wc.status == IBV_WC_REM_ACCESS_ERR && wc.wr_id == 50 && wc.qp_num == a->qp_num;
		usleep(2000);
	}
	struct ibv_async_event ev;
	struct pollfd p = { ctx->async_fd, POLLIN, 0 };
	int events = 0, right = 0;
	while (poll(&p, 1, 200) > 0) {
		NEED(!ibv_get_async_event(ctx, &ev));
		events++;
		right += ev.element.qp == a || ev.element.qp == b;
		ibv_ack_async_event(&ev);
	}
	SAY("refused %d, flushed receives %d, async events %d, of our qps %d\n", refused, flushed > 0, events > 0, right == events);
	/* from RESET it works again */
	struct ibv_qp_attr r = { .qp_state = IBV_QPS_RESET };
	SAY("reset %d %d\n", ibv_modify_qp(a, &r, IBV_QP_STATE), ibv_modify_qp(b, &r, IBV_QP_STATE));
	up(a, b), up(b, a);
	post_recv(b, NULL, 300, HALF, 64);
	post(a, 60, IBV_WR_SEND, 0, 0, 4, 0);
	expect(cq, "after reset", b);
	SAY("destroy cq in use: %d\n", ibv_destroy_cq(cq));
	SAY("dealloc pd in use: %d\n", ibv_dealloc_pd(pd));
	destroy(a, b, cq);
}

static void events_and_srq(void)
{
	struct ibv_comp_channel *ch = ibv_create_comp_channel(ctx);
	NEED(ch);
	struct ibv_cq *cq = ibv_create_cq(ctx, 64, &pd, ch, 0), *got;
	NEED(cq);
	SAY("channel: cq->channel %d refcnt %d busy %d\n", cq->channel == ch, ch->refcnt, ibv_destroy_comp_channel(ch));
	struct ibv_srq_init_attr sa = { .srq_context = &mr, .attr = { .max_wr = 20, .max_sge = 2 } };
	struct ibv_srq *srq = ibv_create_srq(pd, &sa);
	NEED(srq);
	SAY("srq: %u %u context %d\n", sa.attr.max_wr, sa.attr.max_sge, srq->srq_context == &mr);
	struct ibv_qp *a = make(cq, cq, srq, 0, NULL), *b = make(cq, cq, srq, 0, NULL);
	up(a, b), up(b, a);
	for (int i = 0; i < 10; i++)
		post_recv(NULL, srq, 1000 + i, HALF + 64 * i, 64);
	post_recv(b, NULL, 1, 0, 4);
	struct ibv_srq_attr q = { .srq_limit = 5 };
	SAY("limit: %d", ibv_modify_srq(srq, &q, IBV_SRQ_LIMIT));
	SAY(" query %d %u %u\n", ibv_query_srq(srq, &q), q.max_wr, q.srq_limit);
	void *tag;
	int acked = 0;
	for (int i = 0; i < 8; i++) {
		NEED(!ibv_req_notify_cq(cq, 0));
		sprintf(buf, "message %d", i);
		post(i & 1 ? b : a, i, IBV_WR_SEND, 0, 0, 16, 0);
		NEED(!ibv_get_cq_event(ch, &got, &tag));
		if (got != cq || tag != &pd)
			SAY("WRONG EVENT\n");
		if (i & 1)
			ibv_ack_cq_events(cq, 2), acked += 2;
		expect(cq, "srq", i & 1 ? a : b);
		SAY("  '%s'\n", buf + HALF + 64 * i);
	}
	struct ibv_async_event ev;
	NEED(!ibv_get_async_event(ctx, &ev));
	SAY("async %s, ours %d\n", ibv_event_type_str(ev.event_type), ev.element.srq == srq);
	ibv_ack_async_event(&ev);
	SAY("acked %d resize %d cqe %d\n", acked, ibv_resize_cq(cq, 100), cq->cqe);
	SAY("destroy srq in use %d\n", ibv_destroy_srq(srq));
	int r = ibv_destroy_qp(a), s = ibv_destroy_qp(b);
	SAY("destroy %d %d, srq %d", r, s, ibv_destroy_srq(srq));
	SAY(" cq %d", ibv_destroy_cq(cq));
	SAY(" channel %d\n", ibv_destroy_comp_channel(ch));
}

static void extended(void)
{
	struct ibv_cq_init_attr_ex ca = { .cqe = 32, .wc_flags = IBV_WC_STANDARD_FLAGS };
	struct ibv_cq_ex *cq = ibv_create_cq_ex(ctx, &ca);
	NEED(cq);
	struct ibv_qp_init_attr_ex qa = { .send_cq = ibv_cq_ex_to_cq(cq), .recv_cq = ibv_cq_ex_to_cq(cq), .qp_type = IBV_QPT_RC, .pd = pd,
		.cap = { .max_send_wr = 8, .max_recv_wr = 8, .max_send_sge = 2, .max_recv_sge = 2, .max_inline_data = 32 },
		.comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
		.send_ops_flags = IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_RDMA_WRITE };
	struct ibv_qp *a = ibv_create_qp_ex(ctx, &qa), *b = ibv_create_qp_ex(ctx, &qa);
	NEED(a && b);
	up(a, b), up(b, a);
	struct ibv_qp_ex *x = ibv_qp_to_qp_ex(a);
	NEED(x);
	SAY("builders: send %d write %d read %d\n", !!x->wr_send, !!x->wr_rdma_write, !!x->wr_rdma_read);
	post_recv(b, NULL, 5, HALF, 64);
	post_recv(b, NULL, 6, HALF + 64, 64);
	ibv_wr_start(x);
	x->wr_id = 70; x->wr_flags = IBV_SEND_SIGNALED | IBV_SEND_INLINE;
	ibv_wr_send(x);
	strcpy(buf, "built");
	ibv_wr_set_inline_data(x, buf, 6);
	memset(buf, 'y', 6);
	x->wr_id = 71; x->wr_flags = IBV_SEND_SIGNALED;
	ibv_wr_send(x);
	ibv_wr_set_sge(x, mr->lkey, (uintptr_t)buf, 6);
	SAY("complete %d\n", ibv_wr_complete(x));
	int seen = 0, recvs = 0;
	for (int i = 0; i < 4000 && seen < 4; i++, usleep(200)) {
		struct ibv_poll_cq_attr pa = { 0 };
		if (ibv_start_poll(cq, &pa))
			continue;
		do {
			seen++;
			if (cq->status)
				SAY("status %d wr_id %lu\n", cq->status, (unsigned long)cq->wr_id);
			if (ibv_wc_read_opcode(cq) & 128)
				recvs += ibv_wc_read_qp_num(cq) == b->qp_num && ibv_wc_read_byte_len(cq) == 6;
		} while (!ibv_next_poll(cq));
		ibv_end_poll(cq);
	}
	SAY("extended: %d completions, %d receives, '%s' '%.6s'\n", seen, recvs, buf + HALF, buf + HALF + 64);
	destroy(a, b, ibv_cq_ex_to_cq(cq));
	ca.wc_flags = IBV_WC_EX_WITH_COMPLETION_TIMESTAMP;
	errno = 0;
	cq = ibv_create_cq_ex(ctx, &ca);
	SAY("timestamps: %d %s\n", !!cq, cq ? "" : strerror(errno));
}

int main(int argc, char **argv)
{
	NEED(argc > 1);
	gid_index = atoi(argv[1]);
	int n;
	struct ibv_device **list = ibv_get_device_list(&n);
	NEED(list && n > 0);
	ctx = ibv_open_device(list[0]);
	NEED(ctx);
	ibv_free_device_list(list);
	if (argc > 2 && !strcmp(argv[2], "creds"))
		NEED(!setgroups(0, NULL));
	struct ibv_device_attr da;
	struct ibv_port_attr pa;
	SAY("device: %d %d", ibv_query_device(ctx, &da), ibv_query_port(ctx, 1, &pa));
	SAY(" ports %d state %d mtu %d, gid %d, bad port %d\n", da.phys_port_cnt, pa.state, pa.active_mtu,
	    ibv_query_gid(ctx, 1, gid_index, &gid), ibv_query_port(ctx, 9, &pa) != 0);
	pd = ibv_alloc_pd(ctx);
	NEED(pd && pd->context == ctx);
	NEED(!posix_memalign((void **)&buf, 4096, SIZE));
	memset(buf, 0, SIZE);
	mr = ibv_reg_mr(pd, buf, SIZE, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC);
	NEED(mr);
	SAY("mr: pd %d context %d addr %d length %zu\n", mr->pd == pd, mr->context == ctx, mr->addr == buf, mr->length);
	errno = 0;
	SAY("mr without local write: %d", !!ibv_reg_mr(pd, buf, SIZE, IBV_ACCESS_REMOTE_WRITE));
	SAY(" errno %d\n", errno);
	traffic();
	events_and_srq();
	extended();
	pid_t child = fork();
	if (!child)
		_exit(7);
	int status;
	waitpid(child, &status, 0);
	SAY("child: %d\n", WEXITSTATUS(status));
	SAY("end: mr %d", ibv_dereg_mr(mr));
	SAY(" pd %d", ibv_dealloc_pd(pd));
	SAY(" device %d\n", ibv_close_device(ctx));
	return 0;
}
