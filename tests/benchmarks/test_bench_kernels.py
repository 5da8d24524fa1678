"""Where a step's time goes: sums, groups and gaps of kernels. A GPU's are made up, a CPU's are run."""

from __future__ import annotations

import pytest
import torch

from benchmarks import kernels
from benchmarks.kernels import Kernel, busy_ns, group_of, profile_step, summarize


def test_busy_is_the_union_of_the_kernels():
    # Two that overlap, one inside another, a gap of 5, one more.
    ran = [Kernel("c", 30, 10), Kernel("a", 0, 10), Kernel("b", 5, 20), Kernel("inside", 6, 3)]
    assert busy_ns(ran) == 25 + 10
    assert busy_ns([]) == 0


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("triton_tem_fused__to_copy_flex_attention_backward_3", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN", "products"),
        ("void cutlass::device_kernel<at::cuda::detail::GroupedGemmKernel>", "grouped products"),
        (
            "_ZN7cutlass13device_kernelIN2at4cuda6detail25enable_3x_kernel_for_sm9xINS_4gemm6kernel13GemmUniversalINS5_17Gr"
            "oupProblemShape",
            "grouped products",
        ),
        (
            "triton_poi_fused__to_copy__unsafe_view_add_clone_split_with_sizes_stack_sub_2",
            "compiled elementwise work and reductions",
        ),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::split_with_sizes_copy_out_contiguous_no_cast_kernel", "copies"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer and clipping"),
        ("triton_poi_fused__unsafe_view_mul_silu_6", "compiled elementwise work and reductions"),
        ("aten::mm", "products"),
        ("something else", "others"),
    ],
)
def test_groups(name, group):
    assert group_of(name) == group


def test_sums_are_whole(monkeypatch):
    monkeypatch.setattr(kernels, "ROWS", 2)
    runs = [("triton_poi_a", 1, 2.0), ("aten::mm", 1, 5.0), ("triton_poi_a", 1, 1.0), ("x", 3, 0.5), ("y", 1, 0.25)]
    found = summarize(runs)
    assert found["groups"] == {"products": 5.0, "compiled elementwise work and reductions": 3.0, "others": 0.75}
    assert [(row["name"], row["count"], row["ms"]) for row in found["kernels"]] == [
        ("aten::mm", 1, 5.0),
        ("triton_poi_a", 2, 3.0),
        ("2 more", 4, 0.75),
    ]


def test_a_step_on_the_cpu():
    x = torch.randn(64, 64)
    found = profile_step(lambda: (x @ x).relu(), "cpu")
    assert found["wall_ms"] > 0
    names = {row["name"] for row in found["kernels"]}
    assert {"aten::mm", "aten::relu"} <= names
    assert found["groups"]["products"] > 0
    assert "idle_ms" not in found


@pytest.mark.gpu
def test_a_step_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    x @ x
    found = profile_step(lambda: [x @ x for _ in range(3)], "cuda")
    assert found["groups"]["products"] > 0
    assert found["kernels"][0]["count"] == 3
    assert 0 < found["busy_ms"] <= found["wall_ms"]
