"""How a guard runs its denoiser: recorded as CUDA graphs or not, compiled or not, with whose attention. docs/capture.md.

| file | what it is |
|---|---|
| `options`, `attention` | the options of `enable`, checked; attention backends |
| `runner` | what a guard keeps of its denoiser; the bodies of one generation, run eagerly or as graphs, and the graphs' keys |
| `fingerprint`, `switches`, `obstacles` | what a replay cannot notice: in the model, in torch's switches; what must not be recorded |
| `graphs`, `static_inputs`, `cuda_graphs` | the graphs: memory, order, failure; arguments at fixed addresses; every call of torch.cuda |
"""
