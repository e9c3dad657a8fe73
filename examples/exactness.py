"""Do the bits of a row depend on how many rows are computed with it? Of stock PyTorch: yes. Of this library: no.

python examples/exactness.py

Strided decoding computes in one forward what ordinary decoding computes token by token. It can give the same tokens
only if a row keeps its bits whatever comes with it.
"""

import torch

import idlm_kernels

torch.manual_seed(0)
weight = torch.randn(2048, 2048)
prepared = idlm_kernels.prepare_weight(weight)
x = torch.randn(64, 2048)
linears = {"torch.nn.functional.linear": lambda x: torch.nn.functional.linear(x, weight)}
linears["idlm_kernels.linear"] = lambda x: idlm_kernels.linear(x, prepared)
for name, linear in linears.items():
    alone = linear(x[:1])
    changed = [rows for rows in range(2, 65) if not torch.equal(linear(x[:rows])[:1], alone)]
    off = max((linear(x[:rows])[:1] - alone).abs().max().item() for rows in range(2, 65))
    print(f"{name:<28} row 0 changes its bits in {len(changed):>2} of 63 batches, by up to {off:.1e}")
