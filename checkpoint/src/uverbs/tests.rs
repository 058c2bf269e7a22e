//! The numbers in [`super::abi`] are the kernel's: a C program compiled against the real headers prints its own.

use super::abi;
use std::fmt::Write as _;
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;

/// C expression and the value we use for it.
type Fact = (String, u64);

fn numbers() -> Vec<Fact> {
    let mut facts = Vec::new();
    let mut add = |c: &str, ours: u64| facts.push((c.to_owned(), ours));
    add("RDMA_VERBS_IOCTL", abi::RDMA_VERBS_IOCTL);
    macro_rules! same {
        ($($c:literal = $ours:ident;)*) => {$( add($c, abi::$ours as u64); )*};
    }
    same! {
        "UVERBS_ATTR_F_MANDATORY" = ATTR_F_MANDATORY;
        "RDMA_DRIVER_RXE" = DRIVER_RXE;
        "RDMA_DRIVER_UNKNOWN" = DRIVER_UNKNOWN;
        "UVERBS_OBJECT_DEVICE" = OBJECT_DEVICE;
        "UVERBS_OBJECT_PD" = OBJECT_PD;
        "UVERBS_OBJECT_CQ" = OBJECT_CQ;
        "UVERBS_OBJECT_QP" = OBJECT_QP;
        "UVERBS_OBJECT_SRQ" = OBJECT_SRQ;
        "UVERBS_OBJECT_MR" = OBJECT_MR;
        "UVERBS_OBJECT_ASYNC_EVENT" = OBJECT_ASYNC_EVENT;
        "UVERBS_ATTR_UHW_IN" = ATTR_UHW_IN;
        "UVERBS_ATTR_UHW_OUT" = ATTR_UHW_OUT;
        "UVERBS_METHOD_INVOKE_WRITE" = METHOD_INVOKE_WRITE;
        "UVERBS_METHOD_GET_CONTEXT" = METHOD_GET_CONTEXT;
        "UVERBS_ATTR_CORE_IN" = ATTR_CORE_IN;
        "UVERBS_ATTR_CORE_OUT" = ATTR_CORE_OUT;
        "UVERBS_ATTR_WRITE_CMD" = ATTR_WRITE_CMD;
        "UVERBS_ATTR_GET_CONTEXT_NUM_COMP_VECTORS" = ATTR_GET_CONTEXT_NUM_COMP_VECTORS;
        "UVERBS_ATTR_GET_CONTEXT_CORE_SUPPORT" = ATTR_GET_CONTEXT_CORE_SUPPORT;
        "UVERBS_METHOD_QUERY_GID_TABLE" = METHOD_QUERY_GID_TABLE;
        "UVERBS_ATTR_QUERY_GID_TABLE_ENTRY_SIZE" = ATTR_QUERY_GID_TABLE_ENTRY_SIZE;
        "UVERBS_ATTR_QUERY_GID_TABLE_FLAGS" = ATTR_QUERY_GID_TABLE_FLAGS;
        "UVERBS_ATTR_QUERY_GID_TABLE_RESP_ENTRIES" = ATTR_QUERY_GID_TABLE_ENTRIES;
        "UVERBS_ATTR_QUERY_GID_TABLE_RESP_NUM_ENTRIES" = ATTR_QUERY_GID_TABLE_COUNT;
        "UVERBS_METHOD_ASYNC_EVENT_ALLOC" = METHOD_ASYNC_EVENT_ALLOC;
        "UVERBS_ATTR_ASYNC_EVENT_ALLOC_FD_HANDLE" = ATTR_ASYNC_EVENT_ALLOC_FD_HANDLE;
        "UVERBS_METHOD_PD_DESTROY" = METHOD_PD_DESTROY;
        "UVERBS_ATTR_DESTROY_PD_HANDLE" = ATTR_DESTROY_PD_HANDLE;
        "UVERBS_METHOD_CQ_CREATE" = METHOD_CQ_CREATE;
        "UVERBS_METHOD_CQ_DESTROY" = METHOD_CQ_DESTROY;
        "UVERBS_ATTR_CREATE_CQ_HANDLE" = ATTR_CREATE_CQ_HANDLE;
        "UVERBS_ATTR_CREATE_CQ_CQE" = ATTR_CREATE_CQ_CQE;
        "UVERBS_ATTR_CREATE_CQ_USER_HANDLE" = ATTR_CREATE_CQ_USER_HANDLE;
        "UVERBS_ATTR_CREATE_CQ_COMP_CHANNEL" = ATTR_CREATE_CQ_COMP_CHANNEL;
        "UVERBS_ATTR_CREATE_CQ_COMP_VECTOR" = ATTR_CREATE_CQ_COMP_VECTOR;
        "UVERBS_ATTR_CREATE_CQ_RESP_CQE" = ATTR_CREATE_CQ_RESP_CQE;
        "UVERBS_ATTR_CREATE_CQ_EVENT_FD" = ATTR_CREATE_CQ_EVENT_FD;
        "UVERBS_ATTR_DESTROY_CQ_HANDLE" = ATTR_DESTROY_CQ_HANDLE;
        "UVERBS_ATTR_DESTROY_CQ_RESP" = ATTR_DESTROY_CQ_RESP;
        "UVERBS_METHOD_QP_CREATE" = METHOD_QP_CREATE;
        "UVERBS_METHOD_QP_DESTROY" = METHOD_QP_DESTROY;
        "UVERBS_ATTR_CREATE_QP_HANDLE" = ATTR_CREATE_QP_HANDLE;
        "UVERBS_ATTR_CREATE_QP_PD_HANDLE" = ATTR_CREATE_QP_PD_HANDLE;
        "UVERBS_ATTR_CREATE_QP_SRQ_HANDLE" = ATTR_CREATE_QP_SRQ_HANDLE;
        "UVERBS_ATTR_CREATE_QP_SEND_CQ_HANDLE" = ATTR_CREATE_QP_SEND_CQ_HANDLE;
        "UVERBS_ATTR_CREATE_QP_RECV_CQ_HANDLE" = ATTR_CREATE_QP_RECV_CQ_HANDLE;
        "UVERBS_ATTR_CREATE_QP_USER_HANDLE" = ATTR_CREATE_QP_USER_HANDLE;
        "UVERBS_ATTR_CREATE_QP_CAP" = ATTR_CREATE_QP_CAP;
        "UVERBS_ATTR_CREATE_QP_TYPE" = ATTR_CREATE_QP_TYPE;
        "UVERBS_ATTR_CREATE_QP_FLAGS" = ATTR_CREATE_QP_FLAGS;
        "UVERBS_ATTR_CREATE_QP_EVENT_FD" = ATTR_CREATE_QP_EVENT_FD;
        "UVERBS_ATTR_CREATE_QP_RESP_CAP" = ATTR_CREATE_QP_RESP_CAP;
        "UVERBS_ATTR_CREATE_QP_RESP_QP_NUM" = ATTR_CREATE_QP_RESP_QP_NUM;
        "UVERBS_ATTR_DESTROY_QP_HANDLE" = ATTR_DESTROY_QP_HANDLE;
        "UVERBS_ATTR_DESTROY_QP_RESP" = ATTR_DESTROY_QP_RESP;
        "IB_UVERBS_QP_CREATE_SQ_SIG_ALL" = QP_CREATE_SQ_SIG_ALL;
        "UVERBS_METHOD_SRQ_CREATE" = METHOD_SRQ_CREATE;
        "UVERBS_METHOD_SRQ_DESTROY" = METHOD_SRQ_DESTROY;
        "UVERBS_ATTR_CREATE_SRQ_HANDLE" = ATTR_CREATE_SRQ_HANDLE;
        "UVERBS_ATTR_CREATE_SRQ_PD_HANDLE" = ATTR_CREATE_SRQ_PD_HANDLE;
        "UVERBS_ATTR_CREATE_SRQ_USER_HANDLE" = ATTR_CREATE_SRQ_USER_HANDLE;
        "UVERBS_ATTR_CREATE_SRQ_MAX_WR" = ATTR_CREATE_SRQ_MAX_WR;
        "UVERBS_ATTR_CREATE_SRQ_MAX_SGE" = ATTR_CREATE_SRQ_MAX_SGE;
        "UVERBS_ATTR_CREATE_SRQ_LIMIT" = ATTR_CREATE_SRQ_LIMIT;
        "UVERBS_ATTR_CREATE_SRQ_TYPE" = ATTR_CREATE_SRQ_TYPE;
        "UVERBS_ATTR_CREATE_SRQ_EVENT_FD" = ATTR_CREATE_SRQ_EVENT_FD;
        "UVERBS_ATTR_CREATE_SRQ_RESP_MAX_WR" = ATTR_CREATE_SRQ_RESP_MAX_WR;
        "UVERBS_ATTR_CREATE_SRQ_RESP_MAX_SGE" = ATTR_CREATE_SRQ_RESP_MAX_SGE;
        "UVERBS_ATTR_DESTROY_SRQ_HANDLE" = ATTR_DESTROY_SRQ_HANDLE;
        "UVERBS_ATTR_DESTROY_SRQ_RESP" = ATTR_DESTROY_SRQ_RESP;
        "IB_UVERBS_SRQT_BASIC" = SRQT_BASIC;
        "UVERBS_METHOD_MR_DESTROY" = METHOD_MR_DESTROY;
        "UVERBS_ATTR_DESTROY_MR_HANDLE" = ATTR_DESTROY_MR_HANDLE;
        "IB_USER_VERBS_CMD_QUERY_DEVICE" = CMD_QUERY_DEVICE;
        "IB_USER_VERBS_CMD_ALLOC_PD" = CMD_ALLOC_PD;
        "IB_USER_VERBS_CMD_REG_MR" = CMD_REG_MR;
        "IB_USER_VERBS_CMD_CREATE_COMP_CHANNEL" = CMD_CREATE_COMP_CHANNEL;
        "IB_USER_VERBS_CMD_MODIFY_QP" = CMD_MODIFY_QP;
        "IB_USER_VERBS_CMD_MODIFY_SRQ" = CMD_MODIFY_SRQ;
        "IBV_SRQ_LIMIT" = SRQ_ATTR_LIMIT;
    }
    add("sizeof(struct ib_uverbs_gid_entry)", super::gids::ENTRY as u64);
    macro_rules! masks {
        ($($c:literal = $ours:ident;)*) => {$( add($c, u64::from(abi::qp_mask::$ours)); )*};
    }
    masks! {
        "IBV_QP_STATE" = STATE;
        "IBV_QP_ACCESS_FLAGS" = ACCESS_FLAGS;
        "IBV_QP_PKEY_INDEX" = PKEY_INDEX;
        "IBV_QP_PORT" = PORT;
        "IBV_QP_AV" = AV;
        "IBV_QP_PATH_MTU" = PATH_MTU;
        "IBV_QP_TIMEOUT" = TIMEOUT;
        "IBV_QP_RETRY_CNT" = RETRY_CNT;
        "IBV_QP_RNR_RETRY" = RNR_RETRY;
        "IBV_QP_RQ_PSN" = RQ_PSN;
        "IBV_QP_MAX_QP_RD_ATOMIC" = MAX_QP_RD_ATOMIC;
        "IBV_QP_MIN_RNR_TIMER" = MIN_RNR_TIMER;
        "IBV_QP_SQ_PSN" = SQ_PSN;
        "IBV_QP_MAX_DEST_RD_ATOMIC" = MAX_DEST_RD_ATOMIC;
        "IBV_QP_DEST_QPN" = DEST_QPN;
    }
    facts
}

fn layouts() -> Vec<Fact> {
    let mut facts = Vec::new();
    macro_rules! layout {
        ($c:literal, $ours:ty, $($field:ident $(= $c_field:literal)?),* $(,)?) => {
            facts.push((format!("sizeof(struct {})", $c), size_of::<$ours>() as u64));
            $(
                let name = [$($c_field,)? stringify!($field)][0];
                facts.push((format!("offsetof(struct {}, {name})", $c), offset_of!($ours, $field) as u64));
            )*
        };
    }
    layout!("ib_uverbs_ioctl_hdr", abi::IoctlHdr, length, object_id, method_id, num_attrs, driver_id);
    layout!("ib_uverbs_attr", abi::Attr, attr_id, len, flags, attr_data, data);
    layout!("ib_uverbs_query_device", abi::QueryDevice, response);
    layout!(
        "ib_uverbs_query_device_resp",
        abi::QueryDeviceResp,
        max_mr_size,
        max_qp,
        max_qp_wr,
        max_sge,
        max_cq,
        max_cqe,
        max_mr,
        max_pd,
        max_srq,
        max_srq_wr,
        max_srq_sge,
        phys_port_cnt
    );
    layout!("ib_uverbs_alloc_pd", abi::AllocPd, response);
    layout!("ib_uverbs_alloc_pd_resp", abi::AllocPdResp, pd_handle);
    layout!("ib_uverbs_reg_mr", abi::RegMr, start, length, hca_va, pd_handle, access_flags);
    layout!("ib_uverbs_reg_mr_resp", abi::RegMrResp, mr_handle, lkey, rkey);
    layout!("ib_uverbs_create_comp_channel", abi::CreateCompChannel, response);
    layout!("ib_uverbs_create_comp_channel_resp", abi::CreateCompChannelResp, fd);
    layout!("ib_uverbs_destroy_cq_resp", abi::DestroyCqResp, comp_events_reported, async_events_reported);
    layout!("ib_uverbs_qp_cap", abi::QpCap, max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data);
    layout!(
        "ib_uverbs_qp_dest",
        abi::QpDest,
        dgid,
        flow_label,
        dlid,
        sgid_index,
        hop_limit,
        traffic_class,
        sl,
        src_path_bits,
        static_rate,
        is_global,
        port_num
    );
    layout!(
        "ib_uverbs_modify_qp",
        abi::ModifyQp,
        dest,
        alt_dest,
        qp_handle,
        attr_mask,
        qkey,
        rq_psn,
        sq_psn,
        dest_qp_num,
        qp_access_flags,
        pkey_index,
        qp_state,
        path_mtu,
        max_rd_atomic,
        max_dest_rd_atomic,
        min_rnr_timer,
        port_num,
        timeout,
        retry_cnt,
        rnr_retry,
        reserved
    );
    layout!("ib_uverbs_modify_srq", abi::ModifySrq, srq_handle, attr_mask, max_wr, srq_limit);
    layout!("mminfo", abi::RxeMminfo, offset, size);
    layout!("rxe_create_qp_resp", abi::RxeCreateQpResp, rq = "rq_mi", sq = "sq_mi");
    layout!("rxe_create_srq_resp", abi::RxeCreateSrqResp, mi, srq_num);
    facts
}

#[test]
fn every_number_and_layout_is_the_one_of_the_kernel_headers() {
    let headers = std::env::var("MIGRRDMA_RDMA_HEADERS").unwrap_or_else(|_| "/usr/include".into());
    assert!(
        Path::new(&headers).join("rdma/rdma_user_rxe.h").exists(),
        "no RDMA kernel headers under {headers}: install the package libibverbs-dev (or set MIGRRDMA_RDMA_HEADERS)"
    );
    let facts: Vec<Fact> = numbers().into_iter().chain(layouts()).collect();
    let mut source = String::from(
        "#include <stdio.h>\n#include <stddef.h>\n#include <rdma/rdma_user_ioctl.h>\n#include <rdma/rdma_user_ioctl_cmds.h>\n\
         #include <rdma/ib_user_ioctl_cmds.h>\n#include <rdma/ib_user_verbs.h>\n#include <rdma/ib_user_ioctl_verbs.h>\n\
         #include <rdma/rdma_user_rxe.h>\n#include <infiniband/verbs.h>\nint main(void){\n",
    );
    for (expression, _) in &facts {
        writeln!(source, "printf(\"%llu\\n\", (unsigned long long)({expression}));").unwrap();
    }
    source.push_str("return 0;}\n");
    let dir = tempfile::tempdir().unwrap();
    let (c, program) = (dir.path().join("facts.c"), dir.path().join("facts"));
    std::fs::write(&c, source).unwrap();
    let built = Command::new("cc").arg("-I").arg(&headers).arg(&c).arg("-o").arg(&program).output().unwrap();
    assert!(built.status.success(), "cc: {}", String::from_utf8_lossy(&built.stderr));
    let output = Command::new(&program).output().unwrap();
    let theirs: Vec<u64> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(theirs.len(), facts.len());
    let wrong: Vec<String> = facts
        .iter()
        .zip(&theirs)
        .filter(|((_, ours), theirs)| ours != *theirs)
        .map(|((expression, ours), theirs)| format!("{expression}: kernel {theirs}, ours {ours}"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
