"""The block and the patches that every Vision Transformer here is made of."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch.utils.flop_counter import FlopCounterMode

from tasks.vit import ViTBlock, attend, last, patch_rows


def twins(**options) -> tuple[ViTBlock, Block]:
    torch.manual_seed(0)
    ours, theirs = ViTBlock(16, 2, qkv_bias=True, **options).double(), Block(16, 2, qkv_bias=True, **options).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("options", [{}, {"init_values": 0.3}])
def test_block_is_timms(options):
    ours, theirs = twins(**options)
    x = torch.randn(2, 7, 16).double()
    torch.testing.assert_close(ours(x), theirs(x))
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    gradients = (torch.autograd.grad(block(x).sin().sum(), [*block.parameters(), x]) for block in (ours, theirs))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_block_keeps_a_quarter_less_for_the_way_back_and_multiplies_no_more():
    ours, theirs = twins()
    x = torch.randn(4, 65, 16, dtype=torch.float64, requires_grad=True)
    kept, flops = [], []
    for block in (ours, theirs):
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                y = block(x)
            y.sum().backward()
        weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
        kept.append(sum(size for place, size in storages.items() if place not in weights))
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]
    assert kept[0] < 0.8 * kept[1]


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("queries", [1, 4, 7])
def test_answering_for_the_last_tokens_only_is_the_same_answer(queries, qkv_bias):
    torch.manual_seed(0)
    block = ViTBlock(16, 2, qkv_bias=qkv_bias).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    some, every = block(x, None, queries), last(block(x), queries)
    torch.testing.assert_close(some, every)
    weights = torch.randn_like(every)
    wanted = [*block.parameters(), x]
    ours, want = (torch.autograd.grad((out * weights).sum(), wanted) for out in (some, every))
    for mine, theirs in zip(ours, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_and_its_gradients_in_every_precision(dtype):
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, t, 8, dtype=torch.float64, requires_grad=True) for t in (5, 7, 7)]
    want = ((exact[0] @ exact[1].mT / 8**0.5).softmax(-1) @ exact[2]).sin()
    rounded = [x.detach().to(dtype).requires_grad_() for x in exact]
    got = attend(*rounded).sin()
    assert got.dtype == dtype
    close = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got.double(), want, **close)
    gradients = (torch.autograd.grad(y.sum(), x) for y, x in ((got, rounded), (want, exact)))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, **close)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (19, 21)])
def test_patches_times_weight_is_the_strided_convolution(height, width):
    images, weight = torch.randn(2, 3, height, width).double(), torch.randn(5, 3, 4, 4).double()
    want = F.conv2d(images, weight, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(F.linear(patch_rows(images, 4), weight.flatten(1)), want)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (19, 21)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_taking_some_patches_is_taking_rows(height, width, layout):
    images = torch.randn(3, 3, height, width).contiguous(memory_format=layout)
    every = patch_rows(images, 4)
    index = torch.stack([torch.randperm(every.shape[1])[:3] for _ in range(3)])
    want = every.gather(1, index[:, :, None].expand(-1, -1, every.shape[2]))
    assert torch.equal(patch_rows(images, 4, index), want)
