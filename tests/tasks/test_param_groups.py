"""Who is decayed and who learns slower, against the MAE authors' groups."""

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tasks.mae_task import MAETask
from tasks.original_files import mae_names
from tasks.param_groups import layer_decay_groups, weight_decay_groups


@pytest.mark.golden("mae_schedules")
def test_pretraining_decays_what_the_authors_decay(golden):
    want = mae_names(golden.values["pretrain_weight_decay"])
    depth = len({name.split(".")[3] for name in want if name.startswith("encoder.trunk.blocks.")})
    decoder_depth = len({name.split(".")[1] for name in want if name.startswith("decoder_blocks.")})
    config = EncoderConfig(width=48, depth=depth, heads=3, image_size=32, patch_size=8)
    task = MAETask(config, 32, decoder_depth, 2, lr=1e-3, weight_decay=golden.config["pretrain_weight_decay"])
    groups = task.configure_optimizers().param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    ours = {name: decay.get(id(parameter)) for name, parameter in task.model.named_parameters()}
    assert ours == want


@pytest.mark.golden("mae_schedules")
@pytest.mark.parametrize("global_pool", [False, True])
def test_finetuning_groups_are_the_authors(golden, global_pool):
    c = golden.config["finetune"]
    m, want = c["model"], golden.values["finetune_param_groups"][f"global_pool_{str(global_pool).lower()}"]
    config = EncoderConfig(
        width=m["embed_dim"], depth=m["depth"], heads=m["num_heads"], image_size=m["img_size"],
        patch_size=m["patch_size"], mlp_ratio=m["mlp_ratio"], qkv_bias=m["qkv_bias"], positions="learned",
    )  # fmt: skip
    trunk = Encoder(config).trunk
    trunk.head = nn.Linear(m["embed_dim"], m["num_classes"])
    if global_pool:
        del trunk.norm, trunk.fc_norm
        trunk.fc_norm = nn.LayerNorm(m["embed_dim"])  # the authors register it after the head, which orders the groups
    groups = layer_decay_groups(
        trunk.named_parameters(), m["depth"], c["weight_decay"], c["layer_decay"], want["no_weight_decay_list"]
    )
    assert len(groups) == want["num_groups"]
    place = {id(parameter): (i, group) for i, group in enumerate(groups) for parameter in group["params"]}
    named = dict(trunk.named_parameters())
    assert named.keys() == want["params"].keys()
    for name, recorded in want["params"].items():
        index, group = place[id(named[name])]
        assert list(named[name].shape) == recorded["shape"]
        assert (index, group["weight_decay"]) == (recorded["group"], recorded["weight_decay"])
        assert abs(group["lr_scale"] - recorded["lr_scale"]) < 1e-12


def test_an_encoders_own_names_give_the_same_groups():
    encoder = Encoder(EncoderConfig(width=16, depth=2, heads=1, image_size=16, patch_size=8, positions="learned"))
    named, bare = encoder.named_parameters(), encoder.trunk.named_parameters()
    ours = [(len(g["params"]), g["lr_scale"]) for g in layer_decay_groups(named, 2, 0.05, 0.5)]
    assert ours == [(len(g["params"]), g["lr_scale"]) for g in layer_decay_groups(bare, 2, 0.05, 0.5)]
    assert {scale for _, scale in ours} == {0.125, 0.25, 0.5, 1.0}


def test_every_trained_parameter_is_in_one_group():
    encoder = Encoder(EncoderConfig(width=16, depth=2, heads=1, image_size=16, patch_size=8, registers=2))
    trained = {id(p) for p in encoder.parameters() if p.requires_grad}
    for groups in (
        weight_decay_groups(encoder.named_parameters(), 0.1),
        layer_decay_groups(encoder.named_parameters(), 2, 0.1, 0.7),
    ):
        listed = [id(p) for group in groups for p in group["params"]]
        assert len(listed) == len(set(listed))
        assert set(listed) == trained


def test_a_norm_before_the_blocks_learns_as_slowly_as_the_embedding():
    names = ["norm_pre.weight", "patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.weight"]
    groups = layer_decay_groups([(name, Parameter(torch.zeros(2))) for name in names], 1, 0.05, 0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert sorted(scale.values()) == [0.25, 0.25, 0.5, 1.0] and groups[0]["lr_scale"] == 0.25
    assert len(groups[0]["params"]) == 2
