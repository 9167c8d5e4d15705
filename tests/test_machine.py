"""What a number was measured with, and which library multiplies."""

from types import SimpleNamespace

import pytest
import torch

from experiments import machine

onednn = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch was built without oneDNN")


def operands(m, k, n, layout):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator) for shape in ((m, k), (k, n)))
    if layout == "transposed":
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    if layout == "parts of others":
        a, b = torch.cat([a, a], 1)[:, :k], torch.cat([b, b], 1)[:, n:]
    return a, b


@onednn
@pytest.mark.parametrize("layout", ["rows", "transposed", "parts of others"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (200, 64, 96), (129, 4, 700), (700, 700, 1)])
def test_products_are_products(shape, layout):
    a, b = operands(*shape, layout)
    bias = torch.randn(shape[2])
    exact = a.double() @ b.double()
    for found, expected in (
        (machine._mm(a, b), exact),
        (machine._addmm(bias, a, b), exact + bias),
        (machine._addmm(bias, a, b, beta=0.5, alpha=2), 0.5 * bias + 2 * exact),
        (machine._addmm(torch.ones(*exact.shape), a, b), exact + 1),
    ):
        assert found.dtype == torch.float32 and found.shape == exact.shape
        assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert torch.equal(machine._mm(a.double(), b.double()), exact)


@pytest.mark.parametrize(
    ("capability", "vendor"), [("AVX2", "AuthenticAMD"), ("AVX512", "GenuineIntel"), ("AVX512", None)]
)
def test_the_processor_decides_who_multiplies(monkeypatch, capability, vendor):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(machine, "_processor", lambda: {"vendor_id": vendor} if vendor else {})
    monkeypatch.setattr(machine, "_products", None)  # which nothing is to be registered with
    assert machine.fast_products.__wrapped__() == "torch"


@onednn
def test_amd_with_avx512_multiplies_by_onednn(monkeypatch):
    registered = {}
    library = SimpleNamespace(impl=lambda operator, function, key: registered.update({(operator, key): function}))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(machine, "_processor", lambda: {"vendor_id": "AuthenticAMD"})
    monkeypatch.setattr(machine, "_products", library)
    assert machine.fast_products.__wrapped__() == "oneDNN"
    assert registered == {("mm", "CPU"): machine._mm, ("addmm", "CPU"): machine._addmm}
