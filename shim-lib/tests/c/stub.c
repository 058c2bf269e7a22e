/* A libibverbs.so.1 without a device behind it: posting counts, polling answers. For measuring what the shim adds to a
 * post and a poll, on any machine. Only what `loop.c` calls is here. */
#include <infiniband/verbs.h>
#include <stdlib.h>
#include <string.h>

struct stub_qp { struct ibv_qp qp; char provider_part[1024]; };
struct stub_cq { struct ibv_cq cq; char provider_part[1024]; unsigned long posted, polled; unsigned qpn; };

static struct ibv_device device = { .name = "stub0" };
static struct ibv_device *list[] = { &device, NULL };

static int post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
	struct stub_cq *cq = (struct stub_cq *)qp->send_cq;
	for (; wr; wr = wr->next)
		cq->posted++, cq->qpn = qp->qp_num;
	return 0;
}

static int post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad) { return 0; }

static int poll_cq(struct ibv_cq *c, int n, struct ibv_wc *wc)
{
	struct stub_cq *cq = (struct stub_cq *)c;
	int i = 0;
	for (; i < n && cq->polled < cq->posted; i++, cq->polled++)
		wc[i] = (struct ibv_wc){ .wr_id = cq->polled, .qp_num = cq->qpn };
	return i;
}

struct ibv_device **ibv_get_device_list(int *n) { if (n) *n = 1; return list; }
void ibv_free_device_list(struct ibv_device **l) { (void)l; }

struct ibv_context *ibv_open_device(struct ibv_device *d)
{
	struct verbs_context *v = calloc(1, sizeof(*v) + 1024);
	v->sz = sizeof(*v);
	v->context.device = d;
	v->context.abi_compat = __VERBS_ABI_IS_EXTENDED;
	v->context.cmd_fd = v->context.async_fd = -1;
	v->context.ops.post_send = post_send;
	v->context.ops.post_recv = post_recv;
	v->context.ops.poll_cq = poll_cq;
	return &v->context;
}

struct ibv_pd *ibv_alloc_pd(struct ibv_context *c)
{
	struct ibv_pd *pd = calloc(1, sizeof(*pd));
	pd->context = c;
	return pd;
}

struct ibv_cq *ibv_create_cq(struct ibv_context *c, int cqe, void *tag, struct ibv_comp_channel *ch, int v)
{
	struct stub_cq *cq = calloc(1, sizeof(*cq));
	cq->cq.context = c;
	cq->cq.cqe = cqe;
	return &cq->cq;
}

struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *a)
{
	struct stub_qp *qp = calloc(1, sizeof(*qp));
	qp->qp = (struct ibv_qp){ .context = pd->context, .pd = pd, .send_cq = a->send_cq, .recv_cq = a->recv_cq,
		.qp_num = 17, .qp_type = a->qp_type };
	return &qp->qp;
}

int ibv_destroy_qp(struct ibv_qp *qp) { free(qp); return 0; }
int ibv_destroy_cq(struct ibv_cq *cq) { free(cq); return 0; }
int ibv_dealloc_pd(struct ibv_pd *pd) { free(pd); return 0; }
int ibv_close_device(struct ibv_context *c) { return 0; }
