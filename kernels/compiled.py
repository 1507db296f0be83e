"""The guided step on the CPU as one compiled pass: backend "compiled", opt-in, needs a C compiler on the machine.

The C text below is compiled on first use (about a second; the result is kept in the user's cache directory) and called through
ctypes. Decisions are not written twice: `c_source` translates `decide`. A sample is one thread's work, d is summed over
fixed lanes and blocks, and without -ffast-math and with -ffp-contract=off every element is rounded alike: a sample's bits do not
depend on the batch or on the number of threads. float32 only; the caller falls back to the twin for other dtypes.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import hashlib
import inspect
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from . import codes
from .arguments import Operands
from .decide import decide
from .twin import guided_step_torch

FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC", "-std=c11", "-x", "c")

_TEMPLATE = """
#include <math.h>
#include <stdint.h>
#define BLOCK 1024
#define LANES 64

static int decide(double *state, const double *rule, const double *row, double d, int both) {
%(decide)s
}

/* Sum of squares of one block: LANES running sums, then the lanes in order. */
static float squares(const float *u, const float *c, int64_t n) {
    float lanes[LANES] = {0}, total = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) { float s = c[i + l] - u[i + l]; lanes[l] += s * s; }
    for (; i < n; i++) { float s = c[i] - u[i]; lanes[i %% LANES] += s * s; }
    for (int l = 0; l < LANES; l++) total += lanes[l];
    return total;
}

static void multiply(float *out, float w, const float *in, int64_t n) {
    if (w != 0) for (int64_t i = 0; i < n; i++) out[i] = w * in[i];
    else for (int64_t i = 0; i < n; i++) out[i] = 0;
}

static void add(float *out, float w, const float *in, int64_t n) {
    if (w != 0) for (int64_t i = 0; i < n; i++) out[i] += w * in[i];
}

void step(const float *u, const float *c, float *x, float *history, float *y, float *trace, double *states, const double *rows,
          const double *rules, const float *guidance, const float *noise, double *times, int64_t u_stride, int64_t c_stride,
          int64_t noise_stride, int64_t slot_stride, int64_t batch, int64_t size, int64_t slots, int64_t steps, int64_t halves,
          int64_t time_halves, int threads) {
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < batch; b++) {
        double *state = states + b * %(state_width)d;
        const int64_t k = state[%(STEP)d];
        const double *row = rows + (k + (int64_t)state[%(BASE)d]) * %(row_width)d, *next = row + %(row_width)d;
        if (row[%(ACTIVE)d] == 0) continue;
        const float *ub = u + b * u_stride, *cb = c ? c + b * c_stride : 0, *zb = noise ? noise + b * noise_stride : 0;
        float *xb = x + b * size, d = NAN;
        if (c) {
            d = 0;
            for (int64_t i = 0; i < size; i += BLOCK) d += squares(ub + i, cb + i, size - i < BLOCK ? size - i : BLOCK);
        }
        const int before = decide(state, rules + b * %(rule_width)d, row, d, c != 0);
        trace[k * batch + b] = d;
        const float g = guidance[(b * steps + k) * 2 + !before], scale = next[%(S)d];
        const int64_t store = row[%(STORE)d];
        for (int64_t i = 0; i < size; i += BLOCK) {
            const int64_t n = size - i < BLOCK ? size - i : BLOCK;
            float e[BLOCK], m[BLOCK], t[BLOCK];
            if (c) for (int64_t j = 0; j < n; j++) e[j] = ub[i + j] + g * (cb[i + j] - ub[i + j]);
            multiply(m, row[%(Q)d], c ? e : ub + i, n);
            add(m, row[%(P)d], xb + i, n);
            multiply(t, row[%(A)d], xb + i, n);
            add(t, row[%(B)d], m, n);
            for (int64_t s = 0; s < slots; s++) add(t, row[%(H0)d + s], history + s * slot_stride + b * size + i, n);
            if (zb) add(t, row[%(N)d], zb + i, n);
            for (int64_t j = 0; j < n; j++) xb[i + j] = t[j];
            if (store >= 0) for (int64_t j = 0; j < n; j++) history[store * slot_stride + b * size + i + j] = m[j];
            for (int64_t h = 0; h < halves; h++)
                for (int64_t j = 0; j < n; j++) y[(h * batch + b) * size + i + j] = scale * t[j];
        }
        for (int64_t h = 0; h < time_halves; h++) times[h * batch + b] = next[%(TIMESTEP)d];
    }
}
"""


def guided_step_compiled(operands: Operands) -> None:
    """`guided_step` for float32 tensors on the CPU; others go to the twin."""
    u, c, x, history, model_input, trace, state, rows, rules, guidance, noise, timestep_out, _ = operands
    latents = (u, c, model_input, noise)
    if x.device.type != "cpu" or any(t is not None and t.dtype != torch.float32 for t in latents):
        guided_step_torch(operands)
        return
    batch = x.shape[0]
    times = None if timestep_out is None else timestep_out.double()
    tensors = (u, c, x, history, model_input, trace, state, rows, rules, guidance, noise, times)
    strides = [0 if t is None else t.stride(0) for t in (u, c, noise, history)]
    library()(
        *[None if t is None else t.data_ptr() for t in tensors],
        *strides,
        batch,
        x.numel() // batch,
        history.shape[0],
        guidance.shape[1],
        0 if model_input is None else model_input.shape[0] // batch,
        0 if times is None else times.shape[0] // batch,
        min(torch.get_num_threads(), batch) if x.numel() > 32768 else 1,  # torch's own grain for a second thread
    )
    if timestep_out is not None and times is not None:
        timestep_out.copy_(times)


@functools.lru_cache(maxsize=1)
def library() -> Any:
    """The compiled function; compiles it unless this machine's cache has it. RuntimeError if that fails."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("backend 'compiled' needs a C compiler: install one, set CC, or use backend 'torch'")
    text = c_source()
    key = hashlib.sha256(repr((text, FLAGS, compiler, _cpu())).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastguard"
    path = cache / f"guided_step-{key}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # on the same disk, so that the rename below is atomic
            built = Path(folder) / "built.so"
            run = subprocess.run(
                [compiler, *FLAGS, "-", "-o", built, "-lm"], input=text, capture_output=True, text=True
            )
            if run.returncode:
                raise RuntimeError(f"backend 'compiled': {compiler} failed:\n{run.stderr[-2000:]}")
            built.rename(path)
    function = ctypes.CDLL(str(path)).step
    function.argtypes = [ctypes.c_void_p] * 12 + [ctypes.c_int64] * 10 + [ctypes.c_int]
    function.restype = None
    return function


def _cpu() -> str:
    """What -march=native depends on, as the cache may lie on a disk that several machines share."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def c_source() -> str:
    numbers = {name: value for name, value in vars(codes).items() if isinstance(value, int)}
    widths = {"state_width": codes.STATE_WIDTH, "row_width": codes.ROW_WIDTH, "rule_width": codes.RULE_WIDTH}
    return _TEMPLATE % {**numbers, **widths, "decide": _translate_decide()}


def _translate_decide() -> str:
    """The body of `decide` in C. It only assigns expressions of comparisons, `&`, arithmetic and `where`, so this is all it takes."""
    function = ast.parse(inspect.getsource(decide)).body[0]
    assert isinstance(function, ast.FunctionDef)
    lines: list[str] = []
    known: set[str] = set()

    def statements(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.Expr):  # the docstring
                continue
            if isinstance(node, ast.If):
                lines.append(f"if ({_expression(node.test)}) {{")
                outer = set(known)
                statements(node.body)
                known.intersection_update(outer)
                lines.append("}")
            elif isinstance(node, ast.Return):
                assert isinstance(node.value, ast.Tuple)
                lines.append(f"return {_expression(node.value.elts[1])};")
            else:
                assert isinstance(node, ast.Assign)
                (target,) = node.targets
                if isinstance(target, ast.Tuple):  # columns of state and rule
                    for index, name in enumerate(map(_expression, target.elts)):
                        lines.append(f"double {name} = {_expression(node.value)}[{index}];")
                        known.add(name)
                elif isinstance(node.value, ast.Tuple):  # the new state
                    lines.extend(f"state[{i}] = {_expression(value)};" for i, value in enumerate(node.value.elts))
                else:
                    name = _expression(target)
                    lines.append(f"{'' if name in known else 'double '}{name} = {_expression(node.value)};")
                    known.add(name)

    statements(function.body)
    return "\n".join("    " + line for line in lines)


_C = {ast.BitAnd: "&&", ast.BitOr: "||", ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_C_COMPARE = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}


def _expression(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Constant):
        return repr(node.value)
    if isinstance(node, ast.Attribute):
        return repr(getattr(codes, node.attr))
    if isinstance(node, ast.Subscript):
        return f"{_expression(node.value)}[{_expression(node.slice)}]"
    if isinstance(node, ast.BinOp):
        return f"({_expression(node.left)} {_C[type(node.op)]} {_expression(node.right)})"
    if isinstance(node, ast.Compare):
        return f"({_expression(node.left)} {_C_COMPARE[type(node.ops[0])]} {_expression(node.comparators[0])})"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "where":
        condition, yes, no = map(_expression, node.args)
        return f"({condition} ? {yes} : {no})"
    raise TypeError(f"decide uses {ast.dump(node)}, which this translation does not know")
