"""How a guard runs its denoiser: recorded as CUDA graphs or not, compiled or not, with whose attention. docs/capture.md.

| file | what it is |
|---|---|
| `options` | the options of `enable`, checked |
| `runner` | runs the bodies of one generation eagerly or as graphs, and makes the graphs' keys |
| `fingerprint`, `switches`, `obstacles` | what a replay cannot notice: in the model, in torch's switches; what must not be recorded |
| `static_inputs` | arguments at fixed addresses |
| `graphs`, `program` | memory, order and failure of recorded bodies; their nouns |
| `cuda_graphs` | every call of torch.cuda |
| `attention`, `torch_compile` | attention backends; torch.compile |
"""
