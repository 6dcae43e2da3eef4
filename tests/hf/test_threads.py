"""One model, called from several threads: each gets its own answer."""

import sys
import threading

import pytest
import tiny_models
import torch

import fusedmoe

THREADS, ROUNDS = 4, 20


@pytest.fixture(autouse=True)
def _switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def listened(model):
    """Someone listens to the routers, so that they are called and their choice is taken."""
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda *given: None)
    return model


# A block that returns the chosen weights beside its output, and one whose router is asked.
CASES = {
    "gpt_oss": fusedmoe.accelerate,
    "mixtral": lambda model: listened(fusedmoe.accelerate(model)),
}


@pytest.mark.parametrize("name", CASES)
def test_threads_do_not_take_each_others_choice(name):
    model = CASES[name](tiny_models.build(tiny_models.by_name(name)))
    prompts = [tiny_models.token_ids(1, 3 + index) for index in range(THREADS)]
    with torch.no_grad():
        wanted = [model(input_ids=prompt).logits for prompt in prompts]
    together, failures = threading.Barrier(THREADS), []

    def call(index):
        together.wait()
        try:
            with torch.no_grad():
                for _ in range(ROUNDS):
                    got = model(input_ids=prompts[index]).logits
                    torch.testing.assert_close(got, wanted[index])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
