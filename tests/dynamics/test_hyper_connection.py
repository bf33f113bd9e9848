"""Several residual streams: what goes through them comes out, and every part of them is learned."""

import pytest
import torch
from dynamics.toys import make_model, random_codes, random_slots
from worldloom.dynamics.hyper_connection import HyperConnection


def make_connection(num_streams: int, *, index: int = 1) -> HyperConnection:
    """One whose shares depend on the token, and are not those of the start."""
    connection = HyperConnection(8, index=index, num_streams=num_streams)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in connection.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return connection


@pytest.mark.parametrize("num_streams", [2, 4])
def test_fresh_streams_are_the_plain_residual_connection_however_many_layers(num_streams):
    """With x-transformers' they doubled, or quadrupled, in every half-layer."""
    tokens_BLD, branch = torch.randn(2, 3, 8), torch.nn.Linear(8, 8)
    plain_BLD, streams_BLsD = tokens_BLD, tokens_BLD[:, :, None].repeat(1, 1, num_streams, 1)
    for index in range(16):
        plain_BLD = plain_BLD + branch(plain_BLD)
        connection = HyperConnection(8, index=index, num_streams=num_streams)
        streams_BLsD = connection(streams_BLsD, branch)
    for stream_BLD in streams_BLsD.unbind(2):
        torch.testing.assert_close(stream_BLD, plain_BLD)


@pytest.mark.parametrize("num_streams", [2, 4])
def test_streams_agree_with_the_sums_of_the_paper_written_out(num_streams):
    connection, branch = make_connection(num_streams), torch.nn.Linear(8, 8)
    streams_sD = torch.randn(num_streams, 8)
    share_st = connection.share.view(num_streams, num_streams + 2)
    for row, stream_D in enumerate(streams_sD):
        by_token = torch.tanh(connection.norm(stream_D) @ connection.share_of_token)
        rows = torch.arange(num_streams)[:, None] == row
        share_st = share_st + rows * by_token * connection.scale
    read_s, mix_ss, write_s = share_st[:, 0], share_st[:, 1:-1], share_st[:, -1]
    added_D = branch(sum(read_s[i] * streams_sD[i] for i in range(num_streams)))
    for j, got_D in enumerate(connection(streams_sD[None, None], branch)[0, 0]):
        mixed_D = sum(mix_ss[i, j] * streams_sD[i] for i in range(num_streams))
        torch.testing.assert_close(got_D, mixed_D + write_s[j] * added_D)


def test_every_weight_of_the_streams_decides_what_comes_out():
    """x-transformers' mix by the same numbers whatever their weights: these get no gradient."""
    model = make_model(residual_streams=4).requires_grad_()
    model(random_codes(model, 4), random_slots(model, 4)).square().sum().backward()
    for layer in model.transformer.layers:
        for connection in layer.streams:
            assert connection.share.grad.all()
            assert connection.share_of_token.grad.any(0).all()
            assert connection.scale.grad.all()


def test_in_bf16_training_the_streams_stay_in_float32():
    connection = make_connection(2)
    tokens_BLsD = 1 + torch.randn(1, 5, 2, 8) * 1e-4  # gone, were it rounded to bf16
    exact_BLsD = connection(tokens_BLsD, torch.zeros_like)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(connection(tokens_BLsD, torch.zeros_like), exact_BLsD)
