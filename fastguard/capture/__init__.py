"""How a guard runs its denoiser: recorded as CUDA graphs or not, compiled or not, with whose attention. docs/capture.md.

| file | what it is |
|---|---|
| `engine` | the options of `enable`, checked |
| `recorded` | what one guarded call records: a row, or all of them |
| `graphed` | the bodies that are recorded, and their keys |
| `fingerprint`, `ambient`, `obstacles` | what a replay cannot notice: in the model, in torch's switches; what must not be recorded |
| `static_inputs`, `static_loop` | tensors at fixed addresses |
| `graphs` | memory, order and failure of recorded bodies; knows nothing of diffusion |
| `cuda_graphs` | every call of torch.cuda |
| `attention`, `compiled` | attention backends; torch.compile |
| `tune` | gain against memory, measured |
"""
