import torch

from mmpt.objectives.balance import pack_balance
from mmpt.types import Routing


def test_layers_add_up_pack_by_pack():
    load = torch.tensor([3, 1])
    first, second = torch.tensor([1.0, 2.0, 4.0], requires_grad=True), torch.tensor([0.5, 0.25, 0.125], requires_grad=True)
    found = pack_balance((Routing(load=load, balance=first), Routing(load=load, balance=second)))
    assert found.tolist() == [1.5, 2.25, 4.125]
    assert all((g == 1).all() for g in torch.autograd.grad(found.sum(), (first, second)))


def test_without_experts_or_with_biases_there_is_none():
    assert pack_balance(()) is None
    assert pack_balance((Routing(load=torch.tensor([3, 1]), balance=None),)) is None
