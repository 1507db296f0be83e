"""Options of `enable`: who computes attention, compilation inside a capture, and what cannot be recorded."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import fastguard
from fastguard.capture import attention, runner
from fastguard.capture.fingerprint import Fingerprint
from tests import pipelines
from tests.capture import simulator

SIZE = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def sd():
    return pipelines.sd()


def call(pipe, steps=2, **kwargs):
    generator = torch.Generator().manual_seed(3)
    arguments = {"prompt": "a cat", "output_type": "latent", "guidance_scale": 4.0, **SIZE, **kwargs}
    return pipe(num_inference_steps=steps, generator=generator, **arguments).images


def run(pipe, **options):
    with fastguard.enable(pipe, "cfg", **options) as guard:
        return call(pipe), guard.report


# Defaults -------------------------------------------------------------------------------------------------------------------


def test_on_the_cpu_nothing_is_recorded(sd):
    with fastguard.enable(sd, "cfg") as guard:
        call(sd)
        assert (guard.report.path, guard.report.reason, guard.graphs()) == ("fused", None, [])
        assert guard.graphs.bytes == 0
    for mode in ("step", "loop"):
        _, report = run(sd, capture=mode)
        assert report.path == "fused"
        assert f"capture='{mode}': nothing records graphs on device 'cpu'" in report.reason


def test_auto_records_small_work_only(sd, monkeypatch):
    assert runner.LAUNCH_BOUND == 32_768  # SD 1.5 up to batch 4, SDXL at batch 1
    monkeypatch.setattr(runner, "LAUNCH_BOUND", 2 * 32 * 32)
    with simulator.recording(), fastguard.enable(sd, "cfg") as guard:
        call(sd)
        assert guard.report.path == "fused, step graph"
        call(sd, height=64, width=64, steps=1)  # the limit
        assert guard.report.path == "fused, step graph"
        call(sd, height=72, width=64, steps=1)
        assert guard.report.path == "fused" and "up to 2,048 positions" in guard.report.reason
        assert "here are 2,304" in guard.report.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capture": "graph"}, "capture='graph': allowed are 'off', 'step', 'loop', 'auto'"),
        ({"compile": "yes"}, "compile='yes': must be True, False or a dictionary"),
        ({"compile": {"modes": "default"}}, "compile: 'modes' is no argument of torch.compile; allowed are fullgraph"),
        ({"compile": {"mode": "reduce-overhead"}}, "mode='reduce-overhead' would record CUDA graphs"),
        ({"compile": {"mode": "max-autotune"}}, "mode='max-autotune' would record CUDA graphs"),
        ({"compile": {"options": {"triton.cudagraphs": True}}}, "triton.cudagraphs must be off"),
        ({"compile": {"backend": "cudagraphs"}}, "must be off"),
        ({"attention_backend": "fast"}, "attention_backend='fast': allowed are None, .*flash.*sdpa.*xformers"),
        ({"attention_backend": 3}, "attention_backend=3: allowed are"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options(sd, options, message):
    with pytest.raises(ValueError, match=message):
        fastguard.enable(sd, "cfg", **options)
    assert "_fastguard_guard" not in vars(sd)


def test_graphs_of_the_compilers_own_may_not_be_switched_on_for_the_whole_process(sd):
    with torch._inductor.config.patch("triton.cudagraphs", True):
        for options in (True, {"mode": "max-autotune-no-cudagraphs"}):
            with pytest.raises(ValueError, match="TORCHINDUCTOR_CUDAGRAPHS"):
                fastguard.enable(sd, "cfg", compile=options)
        for options in ({"options": {"triton.cudagraphs": False}}, {"backend": "aot_eager"}):
            with fastguard.enable(sd, "cfg", compile=options):
                pass


def test_enabling_again_replaces_options(sd):
    with simulator.recording():
        guard = fastguard.enable(sd, "cfg", capture="step")
        assert fastguard.enable(sd, "cfg", capture="off") is guard
        call(sd)
        assert guard.report.path == "fused"
        guard.disable()


# Attention ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdpa", "native", "native_math", "_native_math"])
def test_attention_backends_of_torch(sd, name):
    """The named backend computes, and the numbers are attention's."""
    expected, _ = run(sd)
    ours, _ = run(sd, attention_backend=name)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    with simulator.recording():
        recorded, report = run(sd, attention_backend=name, capture="step")
    assert torch.equal(recorded, ours) and report.path == "fused, step graph"


def test_the_dispatcher_is_asked_in_our_calls_only(sd, monkeypatch):
    asked = []
    original = attention.dispatch.dispatch_attention_fn

    def dispatch(*args, backend=None, **kwargs):
        asked.append(backend)
        return original(*args, backend=backend, **kwargs)

    processors = dict(sd.unet.attn_processors)
    with fastguard.enable(sd, "cfg", attention_backend="native_math"):
        monkeypatch.setattr(attention.dispatch, "dispatch_attention_fn", dispatch)
        call(sd)
        inside = len(asked)
        assert inside and set(asked) == {attention.Backend._NATIVE_MATH}
        F.scaled_dot_product_attention(*torch.ones(3, 1, 1, 4, 8))
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(*torch.ones(3, 1, 1, 4, 8)))
        thread.start()
        thread.join()
        assert len(asked) == inside
    call(sd)
    assert len(asked) == inside
    assert sd.unet.attn_processors == processors


@pytest.mark.parametrize(
    ("name", "message"),
    [("xformers", "install `xformers"), ("flash", "install `flash-attn"), ("sage", "sageattention"), ("flash_hub", "kernels")],
)  # fmt: skip
def test_backends_that_are_missing_say_what_they_need(sd, name, message, monkeypatch):
    monkeypatch.setattr(attention.dispatch, "is_kernels_available", lambda: False)
    for flag in ("_CAN_USE_XFORMERS_ATTN", "_CAN_USE_FLASH_ATTN", "_CAN_USE_SAGE_ATTN"):
        monkeypatch.setattr(attention.dispatch, flag, False)
    with pytest.raises(ValueError, match=f"attention_backend='{name}': cannot run with .*{message}"):
        fastguard.enable(sd, "cfg", attention_backend=name)


def test_a_backend_that_computes_something_else_is_refused(sd, monkeypatch):
    monkeypatch.setattr(attention.dispatch, "dispatch_attention_fn", lambda q, *a, **k: q * 2)
    with pytest.raises(ValueError, match="cannot run"):
        fastguard.enable(sd, "cfg", attention_backend="native")


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"compile": {"backend": "eager"}}, marks=pytest.mark.slow)], ids=["", "compiled"]
)
@pytest.mark.parametrize("capture", ["off", "step"])
def test_a_backend_that_the_denoiser_never_asks_is_not_ignored_silently(capture, options):
    pipe = pipelines.sd()
    expected, _ = run(pipe)
    pipe.unet.set_attn_processor(AttnProcessor())
    with simulator.recording():
        guard = fastguard.enable(pipe, "cfg", capture=capture, attention_backend="native", **options)
        for _ in range(2):
            with pytest.raises(
                ValueError, match="'native': UNet2DConditionModel never calls scaled_dot_product_attention"
            ):
                call(pipe)
        pipe.unet.set_attn_processor(AttnProcessor2_0())
        torch.testing.assert_close(call(pipe), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        assert guard.report.path == ("fused" if capture == "off" else "fused, step graph"), guard.report.reason
        guard.disable()


@pytest.mark.parametrize("capture", ["off", "step"])
def test_a_backend_that_is_not_asked_any_more_is_not_ignored_silently(capture):
    pipe = pipelines.sd()
    with simulator.recording(), fastguard.enable(pipe, "cfg", capture=capture, attention_backend="native"):
        call(pipe)
        pipe.unet.set_attn_processor(AttnProcessor())
        with pytest.raises(ValueError, match="never calls scaled_dot_product_attention"):
            call(pipe)


def test_rows_that_skip_attention_are_no_news():
    """As diffusers' caches have it: one row computes attention, the next takes what that one gave."""
    pipe = pipelines.sd()
    row = {"number": 0}
    for processor in pipe.unet.attn_processors.values():
        processor.__class__ = Skipping
        processor.row = row
    pipe.unet.register_forward_hook(lambda *_: row.update(number=row["number"] + 1))
    image, report = run(pipe, attention_backend="native")
    assert image.isfinite().all() and len(report[0].d_curve) > 1


class Skipping(AttnProcessor2_0):
    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states if self.row["number"] % 2 else super().__call__(attn, hidden_states, *args, **kwargs)


@pytest.mark.slow
def test_a_model_that_its_owner_compiled_asks_the_backend(sd):
    """Compiled code counts nothing, so the model is asked once as it is; what runs is the compiled one."""
    pipe = pipelines.sd()
    ours, _ = run(pipe, attention_backend="native_math")
    pipe.unet.compile(backend="eager")
    again, _ = run(pipe, attention_backend="native_math")
    assert torch.equal(ours, again)


# Compilation ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("what", ["module", "in place", "forward"])
def test_modules_with_graphs_of_their_own_are_refused(mode, what):
    pipe = pipelines.sd()
    block = pipe.unet.mid_block
    if what == "in place":
        block.compile(mode=mode)
    elif what == "forward":
        block.forward = torch.compile(block.forward, mode=mode)
    else:
        pipe.unet.mid_block = torch.compile(block, mode=mode)
    for capture in ("step", "loop"):
        with pytest.raises(ValueError, match=f"capture='{capture}': .*CUDA graphs of its own"):
            fastguard.enable(pipe, "cfg", capture=capture)
    assert "CUDA graphs of its own" in Fingerprint(pipe.unet).obstacle
    with fastguard.enable(pipe, "cfg"):
        pass  # "auto" leaves such a model alone


@pytest.mark.parametrize("capture", ["off", "step", "loop", "auto"])
def test_a_pipeline_without_its_denoiser_still_encodes_prompts(sd, capture):
    parts = {**sd.components, "unet": None, "vae": None}
    encoder = type(sd)(**parts, requires_safety_checker=False)
    with fastguard.enable(encoder, "cfg", capture=capture):
        ours = encoder.encode_prompt("a cat", "cpu", 1, True)
    stock = sd.encode_prompt("a cat", "cpu", 1, True)
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))
