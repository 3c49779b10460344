"""Formulas against closed form. (The other proofs are still to be ported: git show 6cf742a.)"""

import pytest
import torch

import losses

torch.set_num_threads(1)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_dm_and_ca_add_up_to_the_guided_difference(guidance):
    cond, uncond, fake = torch.randn(3, 4, 2, 3, 3)
    both = losses.dm_direction(cond, fake) + losses.ca_direction(cond, uncond, guidance)
    assert torch.allclose(both, fake - (uncond + guidance * (cond - uncond)), atol=1e-5)


def test_surrogate_loss_has_the_direction_as_its_gradient():
    x, direction = torch.randn(2, 4, 2, 3, 3)
    x.requires_grad_()
    losses.surrogate_loss(x, direction).sum().backward()
    assert torch.allclose(x.grad, direction / 18, atol=1e-6)
