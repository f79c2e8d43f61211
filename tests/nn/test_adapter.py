import pytest
import torch

from fastprompt.nn import Adapter


def adapter(dtype=torch.float64) -> Adapter:
    module = Adapter(6, 3).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def test_it_begins_as_the_identity_and_learns():
    module, rows = Adapter(6, 3), torch.randn(2, 5, 6)
    assert torch.equal(module(rows), rows)
    module(rows).square().sum().backward()
    assert module.up.weight.grad.abs().sum() > 0


def test_formula_and_gradient():
    module, rows = adapter(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    inner = rows @ module.down.weight.T + module.down.bias
    inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(module(rows), rows + inner @ module.up.weight.T + module.up.bias)
    parameters = dict(module.named_parameters())

    def run(rows, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), rows)

    assert torch.autograd.gradcheck(run, (rows, *parameters.values()))


def test_rows_of_a_lower_precision():
    module, rows = adapter(torch.float32), torch.randn(4, 6)
    got = module(rows.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), module(rows), rtol=0.05, atol=0.1)


def test_bad_sizes():
    with pytest.raises(ValueError, match="width and size must be positive, got 6 and 0"):
        Adapter(6, 0)
