"""The benchmark's rows for GPUs take the real training loop: here on the CPU, with the tiny model."""
import benchmark
import torch

import clip


def test_the_rows_for_gpus_run():
    arguments = ["--model", "tiny", "--frames", "2", "--micro-batch", "64", "--amp", "off", "--workers", "0"]
    videos_per_second, waiting, _ = benchmark.steps_of_training(
        clip.load("tiny"), "", arguments, benchmark.Synthetic(64, 2, 64), steps=2)
    assert videos_per_second > 0
    assert 0 <= waiting < 0.5


def test_a_matrix_product_has_two_operations_for_each_pair():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert benchmark.flops(lambda: a @ b) == 2 * 3 * 4 * 5


def test_activations_are_what_is_kept_without_the_weights():
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 2 ** 18, bias=False), torch.nn.Sigmoid()), torch.randn(1, 4)
    mebibytes = benchmark.activations(model, lambda: model(x).sum())
    assert abs(mebibytes - 1) < 1e-3  # the output of the sigmoid, 2 ** 18 floats; and x
