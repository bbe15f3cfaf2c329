from dataclasses import replace

import pytest

from pretrain.cost import StepCost
from pretrain.hardware import GPU
from pretrain.scaling import Cluster, largest_batch, step_time

COST = StepCost(images=10, forward=10 * 10**9, flops=30 * 10**9, weights=0, trained=0, gradients=10**9, present=0,
                optimizer=0, activations=0)  # fmt: skip
AT_ONCE = replace(COST, images=100, forward=100 * 10**9, flops=300 * 10**9)
GPU_OF_100 = GPU(tflops=100, memory=80, link=400)


def test_one_gpu_only_computes() -> None:
    each = step_time(COST, Cluster(GPU_OF_100, nodes=1, gpus=1, network=25, mfu=0.5), rank_batch=100)
    assert each.compute == pytest.approx(100 * 3e9 / 50e12)
    assert (each.communication, each.exposed, each.efficiency) == (0, 0, 1)


def test_the_slowest_link_decides_and_hides_behind_the_backward_pass() -> None:
    near = step_time(AT_ONCE, Cluster(GPU_OF_100, nodes=1, gpus=8, network=25, mfu=0.5), rank_batch=100)
    far = step_time(AT_ONCE, Cluster(GPU_OF_100, nodes=2, gpus=4, network=25, mfu=0.5), rank_batch=100)
    assert near.communication == pytest.approx(2 * 7 / 8 * 1e9 / 400e9)
    assert far.communication == pytest.approx(2 * 7 / 8 * 1e9 / 25e9)
    assert near.exposed == pytest.approx(near.communication - 2 / 3 * 6e-3)
    assert far.total == pytest.approx(6e-3 + far.communication - 4e-3)
    assert far.efficiency == pytest.approx(6e-3 / far.total)
    more = replace(AT_ONCE, images=1000, flops=3000 * 10**9)
    larger = step_time(more, Cluster(GPU_OF_100, nodes=1, gpus=8, network=25, mfu=0.5), rank_batch=1000)
    assert larger.exposed == 0 and larger.efficiency == 1


def test_only_the_backward_pass_of_the_last_micro_batch_hides_communication() -> None:
    cluster = Cluster(GPU_OF_100, nodes=1, gpus=8, network=25, mfu=0.5)
    at_once, ten = (step_time(cost, cluster, rank_batch=100) for cost in (AT_ONCE, COST))
    assert (ten.compute, ten.communication) == (at_once.compute, at_once.communication)
    assert ten.exposed == pytest.approx(ten.communication - 2 / 3 * 6e-4) and ten.exposed > at_once.exposed
    assert step_time(COST, cluster, rank_batch=1000).exposed == pytest.approx(ten.exposed), "however many there are"


def test_a_sharded_model_moves_its_weights_twice_and_its_gradients_once_for_every_micro_batch() -> None:
    cost = replace(COST, gathered=3 * 10**9)
    cluster = Cluster(GPU_OF_100, nodes=2, gpus=4, network=25, mfu=0.5)
    one = step_time(cost, cluster, rank_batch=10, sharded=True)
    assert one.communication == pytest.approx(7 / 8 * 4e9 / 25e9)
    assert one.exposed == pytest.approx(one.communication - one.compute)
    assert step_time(cost, cluster, rank_batch=30, sharded=True).communication == pytest.approx(3 * one.communication)


def test_largest_batch_lies_on_the_line_through_two() -> None:
    def holding(images: int) -> StepCost:
        return StepCost(images, 1, 1, 1000, 1, 0, 0, 0, activations=7 * images)

    assert largest_batch(holding(4), holding(8), room=1000 + 7 * 100) == 100
    assert largest_batch(holding(4), holding(8), room=1000 + 7 * 100 - 1) == 99
    assert largest_batch(holding(4), holding(8), room=900) == 0
