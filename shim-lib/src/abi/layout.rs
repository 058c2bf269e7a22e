//! Compares every layout and number in this folder, and the shape of every exported verb, with the installed headers of
//! libibverbs, by compiling a C program against them.

use std::collections::BTreeMap;
use std::mem::{offset_of, size_of};
use std::path::Path;
use std::process::Command;

use super::*;

/// Facts by their C expression.
fn facts() -> BTreeMap<String, u64> {
    let mut facts = BTreeMap::new();
    macro_rules! layout {
        ($($c:literal $ty:ty { $($field:ident $(. $inner:ident)* = $member:literal),* $(,)? })*) => {$(
            facts.insert(format!("sizeof({})", $c), size_of::<$ty>() as u64);
            $( facts.insert(format!("offsetof({}, {})", $c, $member), offset_of!($ty, $field $(. $inner)*) as u64); )*
        )*};
    }
    layout! {
        "struct ibv_pd" ibv_pd { context = "context", handle = "handle" }
        "struct ibv_mr" ibv_mr { pd = "pd", addr = "addr", length = "length", handle = "handle", lkey = "lkey", rkey = "rkey" }
        "struct ibv_mw" ibv_mw { context = "context", pd = "pd", rkey = "rkey", handle = "handle", kind = "type" }
        "struct ibv_ah" ibv_ah { context = "context", pd = "pd", handle = "handle" }
        "struct ibv_comp_channel" ibv_comp_channel { context = "context", fd = "fd", refcnt = "refcnt" }
        "struct ibv_srq" ibv_srq { srq_context = "srq_context", pd = "pd", handle = "handle", mutex = "mutex", cond = "cond", events_completed = "events_completed" }
        "struct ibv_qp" ibv_qp { qp_context = "qp_context", pd = "pd", send_cq = "send_cq", recv_cq = "recv_cq", srq = "srq", handle = "handle", qp_num = "qp_num", state = "state", qp_type = "qp_type", mutex = "mutex", cond = "cond", events_completed = "events_completed" }
        "struct ibv_cq" ibv_cq { channel = "channel", cq_context = "cq_context", handle = "handle", cqe = "cqe", mutex = "mutex", cond = "cond", comp_events_completed = "comp_events_completed", async_events_completed = "async_events_completed" }
        "struct ibv_cq_ex" ibv_cq_ex { comp_mask = "comp_mask", status = "status", wr_id = "wr_id", start_poll = "start_poll", end_poll = "end_poll", read_opcode = "read_opcode", read_byte_len = "read_byte_len", read_qp_num = "read_qp_num", read_wc_flags = "read_wc_flags", read_dlid_path_bits = "read_dlid_path_bits", read_completion_wallclock_ns = "read_completion_wallclock_ns" }
        "struct ibv_qp_ex" ibv_qp_ex { comp_mask = "comp_mask", wr_id = "wr_id", wr_flags = "wr_flags", wr_atomic_cmp_swp = "wr_atomic_cmp_swp", wr_send = "wr_send", wr_set_ud_addr = "wr_set_ud_addr", wr_set_inline_data_list = "wr_set_inline_data_list", wr_set_sge_list = "wr_set_sge_list", wr_start = "wr_start", wr_abort = "wr_abort" }
        "struct ibv_async_event" ibv_async_event { element = "element", event_type = "event_type" }
        "struct ibv_data_buf" ibv_data_buf { addr = "addr", length = "length" }
        "struct ibv_sge" ibv_sge { addr = "addr", length = "length", lkey = "lkey" }
        "struct ibv_send_wr" ibv_send_wr { next = "next", sg_list = "sg_list", num_sge = "num_sge", opcode = "opcode", send_flags = "send_flags", imm_data = "imm_data", wr = "wr", remote_srqn = "qp_type.xrc.remote_srqn", tail = "bind_mw" }
        "struct ibv_recv_wr" ibv_recv_wr { next = "next", sg_list = "sg_list", num_sge = "num_sge" }
        "struct ibv_wc" ibv_wc { status = "status", opcode = "opcode", vendor_err = "vendor_err", byte_len = "byte_len", imm_data = "imm_data", qp_num = "qp_num", src_qp = "src_qp", wc_flags = "wc_flags", pkey_index = "pkey_index", slid = "slid", sl = "sl", dlid_path_bits = "dlid_path_bits" }
        "struct ibv_mw_bind" ibv_mw_bind { wr_id = "wr_id", send_flags = "send_flags", bind_info = "bind_info" }
        "struct ibv_mw_bind_info" ibv_mw_bind_info { mr = "mr", addr = "addr", length = "length", mw_access_flags = "mw_access_flags" }
        "struct ibv_qp_cap" ibv_qp_cap { max_send_wr = "max_send_wr", max_inline_data = "max_inline_data" }
        "struct ibv_ah_attr" ibv_ah_attr { grh = "grh", dlid = "dlid", is_global = "is_global", port_num = "port_num" }
        "struct ibv_qp_attr" ibv_qp_attr { qp_state = "qp_state", path_mtu = "path_mtu", rq_psn = "rq_psn", qkey = "qkey", sq_psn = "sq_psn", dest_qp_num = "dest_qp_num", qp_access_flags = "qp_access_flags", cap = "cap", ah_attr = "ah_attr", alt_ah_attr = "alt_ah_attr", pkey_index = "pkey_index", en_sqd_async_notify = "en_sqd_async_notify", max_rd_atomic = "max_rd_atomic", min_rnr_timer = "min_rnr_timer", port_num = "port_num", timeout = "timeout", rnr_retry = "rnr_retry", rate_limit = "rate_limit" }
        "struct ibv_qp_init_attr" ibv_qp_init_attr { qp_context = "qp_context", send_cq = "send_cq", recv_cq = "recv_cq", srq = "srq", cap = "cap", qp_type = "qp_type", sq_sig_all = "sq_sig_all" }
        "struct ibv_qp_init_attr_ex" ibv_qp_init_attr_ex { comp_mask = "comp_mask", pd = "pd", xrcd = "xrcd", create_flags = "create_flags", max_tso_header = "max_tso_header", rwq_ind_tbl = "rwq_ind_tbl", rx_hash_conf = "rx_hash_conf", source_qpn = "source_qpn", send_ops_flags = "send_ops_flags" }
        "struct ibv_srq_attr" ibv_srq_attr { max_wr = "max_wr", max_sge = "max_sge", srq_limit = "srq_limit" }
        "struct ibv_srq_init_attr" ibv_srq_init_attr { srq_context = "srq_context", attr = "attr" }
        "struct ibv_srq_init_attr_ex" ibv_srq_init_attr_ex { comp_mask = "comp_mask", srq_type = "srq_type", pd = "pd", xrcd = "xrcd", cq = "cq", tm_cap = "tm_cap" }
        "struct ibv_cq_init_attr_ex" ibv_cq_init_attr_ex { cqe = "cqe", cq_context = "cq_context", channel = "channel", comp_vector = "comp_vector", wc_flags = "wc_flags", comp_mask = "comp_mask", flags = "flags", parent_domain = "parent_domain" }
        "struct ibv_wq_init_attr" ibv_wq_init_attr { max_wr = "max_wr", max_sge = "max_sge", pd = "pd", cq = "cq", comp_mask = "comp_mask" }
        "struct ibv_parent_domain_init_attr" ibv_parent_domain_init_attr { pd = "pd", td = "td", comp_mask = "comp_mask", pd_context = "pd_context" }
        "struct ibv_gid_entry" ibv_gid_entry { gid = "gid", gid_index = "gid_index", port_num = "port_num", gid_type = "gid_type", ndev_ifindex = "ndev_ifindex" }
        "struct ibv_context_ops" ibv_context_ops { alloc_mw = "alloc_mw", bind_mw = "bind_mw", dealloc_mw = "dealloc_mw", poll_cq = "poll_cq", req_notify_cq = "req_notify_cq", post_srq_recv = "post_srq_recv", post_send = "post_send", post_recv = "post_recv" }
        "struct ibv_context" ibv_context { device = "device", ops = "ops", cmd_fd = "cmd_fd", async_fd = "async_fd", num_comp_vectors = "num_comp_vectors", mutex = "mutex", abi_compat = "abi_compat" }
        "struct verbs_context" verbs_context { query_port = "query_port", advise_mr = "advise_mr", alloc_null_mr = "alloc_null_mr", read_counters = "read_counters", attach_counters_point_flow = "attach_counters_point_flow", create_counters = "create_counters", destroy_counters = "destroy_counters", reg_dm_mr = "reg_dm_mr", alloc_dm = "alloc_dm", free_dm = "free_dm", modify_flow_action_esp = "modify_flow_action_esp", destroy_flow_action = "destroy_flow_action", create_flow_action_esp = "create_flow_action_esp", modify_qp_rate_limit = "modify_qp_rate_limit", alloc_parent_domain = "alloc_parent_domain", dealloc_td = "dealloc_td", alloc_td = "alloc_td", modify_cq = "modify_cq", post_srq_ops = "post_srq_ops", destroy_rwq_ind_table = "destroy_rwq_ind_table", create_rwq_ind_table = "create_rwq_ind_table", destroy_wq = "destroy_wq", modify_wq = "modify_wq", create_wq = "create_wq", query_rt_values = "query_rt_values", create_cq_ex = "create_cq_ex", private = "priv", query_device_ex = "query_device_ex", ibv_destroy_flow = "ibv_destroy_flow", old_destroy_flow = "ABI_placeholder2", ibv_create_flow = "ibv_create_flow", old_create_flow = "ABI_placeholder1", open_qp = "open_qp", create_qp_ex = "create_qp_ex", get_srq_num = "get_srq_num", create_srq_ex = "create_srq_ex", open_xrcd = "open_xrcd", close_xrcd = "close_xrcd", placeholder = "_ABI_placeholder3", sz = "sz", context = "context" }
    }
    macro_rules! numbers {
        ($($c:literal = $value:expr),* $(,)?) => {$( facts.insert($c.to_owned(), $value as u64); )*};
    }
    numbers! {
        "IBV_WR_RDMA_WRITE" = wr_opcode::RDMA_WRITE, "IBV_WR_RDMA_WRITE_WITH_IMM" = wr_opcode::RDMA_WRITE_WITH_IMM,
        "IBV_WR_SEND" = wr_opcode::SEND, "IBV_WR_SEND_WITH_IMM" = wr_opcode::SEND_WITH_IMM,
        "IBV_WR_RDMA_READ" = wr_opcode::RDMA_READ, "IBV_WR_ATOMIC_CMP_AND_SWP" = wr_opcode::ATOMIC_CMP_AND_SWP,
        "IBV_WR_ATOMIC_FETCH_AND_ADD" = wr_opcode::ATOMIC_FETCH_AND_ADD, "IBV_WR_LOCAL_INV" = wr_opcode::LOCAL_INV,
        "IBV_WR_BIND_MW" = wr_opcode::BIND_MW, "IBV_WR_SEND_WITH_INV" = wr_opcode::SEND_WITH_INV,
        "IBV_SEND_SIGNALED" = send_flags::SIGNALED, "IBV_SEND_INLINE" = send_flags::INLINE,
        "IBV_WC_SUCCESS" = wc::SUCCESS, "IBV_WC_RECV" = wc::RECV,
        "IBV_EVENT_CQ_ERR" = event::CQ_ERR, "IBV_EVENT_QP_FATAL" = event::QP_FATAL,
        "IBV_EVENT_QP_REQ_ERR" = event::QP_REQ_ERR, "IBV_EVENT_QP_ACCESS_ERR" = event::QP_ACCESS_ERR,
        "IBV_EVENT_COMM_EST" = event::COMM_EST, "IBV_EVENT_SQ_DRAINED" = event::SQ_DRAINED,
        "IBV_EVENT_PATH_MIG" = event::PATH_MIG, "IBV_EVENT_PATH_MIG_ERR" = event::PATH_MIG_ERR,
        "IBV_EVENT_DEVICE_FATAL" = event::DEVICE_FATAL,
        "IBV_EVENT_SRQ_ERR" = event::SRQ_ERR, "IBV_EVENT_SRQ_LIMIT_REACHED" = event::SRQ_LIMIT_REACHED,
        "IBV_EVENT_QP_LAST_WQE_REACHED" = event::QP_LAST_WQE_REACHED,
        "IBV_QP_INIT_ATTR_PD" = qp_init_mask::PD, "IBV_QP_INIT_ATTR_CREATE_FLAGS" = qp_init_mask::CREATE_FLAGS,
        "IBV_QP_INIT_ATTR_SEND_OPS_FLAGS" = qp_init_mask::SEND_OPS_FLAGS,
        "IBV_QP_EX_WITH_RDMA_WRITE" = send_ops::RDMA_WRITE, "IBV_QP_EX_WITH_SEND" = send_ops::SEND,
        "IBV_QP_EX_WITH_SEND_WITH_INV" = send_ops::SEND_WITH_INV, "IBV_QP_EX_WITH_BIND_MW" = send_ops::BIND_MW,
        "IBV_QPT_RC" = qp_type::RC, "IBV_QPT_UD" = qp_type::UD, "IBV_QPS_RESET" = qp_state::RESET, "IBV_QPS_INIT" = qp_state::INIT,
        "IBV_QPS_RTR" = qp_state::RTR, "IBV_QPS_RTS" = qp_state::RTS, "IBV_QPS_SQD" = qp_state::SQD,
        "IBV_QPS_ERR" = qp_state::ERR,
        "IBV_QP_STATE" = qp_mask::STATE, "IBV_QP_EN_SQD_ASYNC_NOTIFY" = qp_mask::EN_SQD_ASYNC_NOTIFY,
        "IBV_QP_QKEY" = qp_mask::QKEY, "IBV_QP_ACCESS_FLAGS" = qp_mask::ACCESS_FLAGS,
        "IBV_QP_PKEY_INDEX" = qp_mask::PKEY_INDEX, "IBV_QP_PORT" = qp_mask::PORT, "IBV_QP_AV" = qp_mask::AV,
        "IBV_QP_PATH_MTU" = qp_mask::PATH_MTU, "IBV_QP_TIMEOUT" = qp_mask::TIMEOUT,
        "IBV_QP_RETRY_CNT" = qp_mask::RETRY_CNT, "IBV_QP_RNR_RETRY" = qp_mask::RNR_RETRY,
        "IBV_QP_RQ_PSN" = qp_mask::RQ_PSN, "IBV_QP_MAX_QP_RD_ATOMIC" = qp_mask::MAX_QP_RD_ATOMIC,
        "IBV_QP_ALT_PATH" = qp_mask::ALT_PATH, "IBV_QP_MIN_RNR_TIMER" = qp_mask::MIN_RNR_TIMER,
        "IBV_QP_SQ_PSN" = qp_mask::SQ_PSN, "IBV_QP_MAX_DEST_RD_ATOMIC" = qp_mask::MAX_DEST_RD_ATOMIC,
        "IBV_QP_DEST_QPN" = qp_mask::DEST_QPN,
        "IBV_SRQ_MAX_WR" = srq_mask::MAX_WR, "IBV_SRQ_LIMIT" = srq_mask::LIMIT,
        "IBV_SRQ_INIT_ATTR_PD" = srq_init::PD, "IBV_SRQ_INIT_ATTR_CQ" = srq_init::CQ,
        "IBV_CQ_INIT_ATTR_MASK_FLAGS" = cq_init::MASK_FLAGS, "IBV_WC_STANDARD_FLAGS" = cq_init::STANDARD,
        "IBV_CREATE_CQ_ATTR_SINGLE_THREADED" = cq_init::SINGLE_THREADED,
    }
    facts
}

/// Runs the C compiler on `source` with the arguments given; its messages on failure.
fn compile(folder: &Path, source: &str, arguments: &[&str]) {
    let file = folder.join("check.c");
    std::fs::write(&file, source).unwrap();
    let out = Command::new("cc")
        .args(arguments)
        .arg(&file)
        .current_dir(folder)
        .output()
        .expect("a C compiler `cc` is needed, and libibverbs-dev");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn layouts_and_numbers_are_those_of_the_installed_headers() {
    let folder = tempfile::tempdir().unwrap();
    let facts = facts();
    let lines: String =
        facts.keys().map(|k| format!("    printf(\"%s\\t%llu\\n\", \"{k}\", (unsigned long long)({k}));\n")).collect();
    let source = format!(
        "#include <infiniband/verbs.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void)\n{{\n{lines}    return 0;\n}}\n"
    );
    compile(folder.path(), &source, &["-o", "check"]);
    let out = Command::new(folder.path().join("check")).output().unwrap();
    let theirs = String::from_utf8(out.stdout).unwrap();
    assert_eq!(theirs.lines().count(), facts.len());
    let wrong: Vec<_> = theirs
        .lines()
        .filter_map(|line| line.split_once('\t'))
        // An older libibverbs has fewer builders at the end.
        .filter(|(name, value)| {
            let (ours, theirs) = (facts[*name], value.parse::<u64>().unwrap());
            if *name == "sizeof(struct ibv_qp_ex)" { ours < theirs } else { ours != theirs }
        })
        .map(|(name, value)| format!("{name} is {value}, not {}", facts[name]))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The C type that a Rust type of an exported function stands for.
fn c_type(rust: &str) -> String {
    if let Some(inner) = rust.strip_prefix("*mut ").or_else(|| rust.strip_prefix("*const ")) {
        return format!("{} *", c_type(inner.trim()));
    }
    match rust.rsplit("::").next().unwrap() {
        "c_int" | "i32" => "int".into(),
        "c_uint" | "u32" => "unsigned int".into(),
        "u8" => "unsigned char".into(),
        "u16" => "unsigned short".into(),
        "u64" => "unsigned long".into(),
        "usize" => "size_t".into(),
        "ssize_t" => "ssize_t".into(),
        "c_void" => "void".into(),
        "ibv_gid" => "union ibv_gid".into(),
        other => format!("struct {other}"),
    }
}

/// Declarations of exported verbs in this crate's sources: name, arguments' types, type returned.
fn exported() -> Vec<(String, Vec<String>, String)> {
    let mut found = Vec::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for file in ["channel", "context", "cq", "events", "mr", "pd", "query", "srq", "qp/life", "qp/modify"] {
        let text = std::fs::read_to_string(root.join(file).with_extension("rs")).unwrap();
        for line in text.lines().map(str::trim).filter(|l| l.starts_with("\"IBVERBS_") && l.contains("|real|")) {
            let (head, _) = line.split_once(", fail ").unwrap();
            let (_, declaration) = head.split_once("fn ").unwrap();
            let (name, rest) = declaration.split_once('(').unwrap();
            let (arguments, returned) = rest.rsplit_once(')').unwrap();
            let types = arguments.split(", ").filter(|a| !a.is_empty()).map(|a| c_type(a.split_once(": ").unwrap().1));
            let returned = returned.trim().strip_prefix("-> ").map_or("void".into(), c_type);
            found.push((name.to_owned(), types.collect(), returned));
        }
    }
    assert!(found.len() > 45, "the sources are not written as this test reads them: {} found", found.len());
    found
}

#[test]
fn exported_verbs_take_and_return_what_the_header_declares() {
    let folder = tempfile::tempdir().unwrap();
    let header = std::fs::read_to_string("/usr/include/infiniband/verbs.h").expect("libibverbs-dev is needed");
    let mut calls = String::new();
    let mut checked = 0;
    for (i, (name, types, returned)) in exported().iter().enumerate() {
        if !header.contains(&format!("{name}(")) {
            continue;
        }
        checked += 1;
        let parameters: Vec<_> = types.iter().enumerate().map(|(n, t)| format!("{t} a{n}")).collect();
        let arguments: Vec<_> = (0..types.len()).map(|n| format!("a{n}")).collect();
        let keep = if returned == "void" { String::new() } else { "return ".into() };
        calls += &format!(
            "{returned} check{i}({});\n{returned} check{i}({})\n{{\n    {keep}({name})({});\n}}\n",
            parameters.join(", "),
            parameters.join(", "),
            arguments.join(", ")
        );
    }
    assert!(checked > 40, "only {checked} of the exports are in the header");
    let source = format!("#include <infiniband/verbs.h>\n#pragma GCC diagnostic error \"-Wconversion\"\n{calls}");
    let strict = ["-c", "-Werror=incompatible-pointer-types", "-Werror=int-conversion", "-Wno-sign-conversion"];
    compile(folder.path(), &source, &strict);
}
