"""Fixtures shared by all tests: small live models whose every weight is perturbed (defaults hide bugs); a browser."""

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

collect_ignore = ["interpret.py"]
"""A script, no doctests: it sets TRITON_INTERPRET."""


THRESHOLDS = gc.get_threshold()


def pytest_collectstart() -> None:
    """Collecting imports a great deal and frees nothing; the garbage collector would look through it all each time.

    It is not disabled, since dask, after every slice, leaves it as it was when dask was imported.
    """
    gc.set_threshold(0)


def pytest_collection_finish() -> None:
    gc.set_threshold(*THRESHOLDS)


def perturb(model: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Move every parameter away from its default: D = 1, norms = 1 and zero biases would hide bugs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype) * (0.1 if name.endswith("A_log") else scale))
    return model.eval()


def tiny_mamba(seed: int = 0, **options: object) -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(seed)
    config = {"vocab_size": 61, "hidden_size": 24, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 3}
    return perturb(MambaForCausalLM(MambaConfig(**(config | options))), seed)


def tiny_mamba2(seed: int = 0, **options: object) -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(seed)
    config = {
        "vocab_size": 61, "hidden_size": 24, "state_size": 8, "num_hidden_layers": 2, "num_heads": 6, "head_dim": 8,
        "n_groups": 2, "chunk_size": 16, "time_step_limit": (0.05, 1.5),
        "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0,
    }  # fmt: skip
    return perturb(Mamba2ForCausalLM(Mamba2Config(**(config | options))), seed)


BUILDERS: dict[str, Callable[..., nn.Module]] = {"mamba": tiny_mamba, "mamba2": tiny_mamba2}


@pytest.fixture(params=sorted(BUILDERS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> nn.Module:
    """A tiny perturbed language model of each supported family."""
    return BUILDERS[family]()


@pytest.fixture
def build(family: str) -> Callable[..., nn.Module]:
    return BUILDERS[family]


@pytest.fixture(autouse=True)
def _quiet_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)


@pytest.fixture
def script(request: pytest.FixtureRequest) -> Callable[..., list[str]]:
    """Runs a script beside the test in a process of its own, without Triton yet; answers its lines."""
    return lambda name, *arguments: _lines(request.path.with_name(name), *arguments)


@pytest.fixture
def interpreted(request: pytest.FixtureRequest) -> Callable[..., list[str]]:
    """The same with Triton's kernels interpreted."""
    return lambda name, *arguments: _lines(
        Path(__file__).with_name("interpret.py"), request.path.with_name(name), *arguments
    )


def _lines(*arguments: str | Path) -> list[str]:
    command, environment = [sys.executable, "-W", "ignore", *arguments], os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update")  # fmt: skip


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium without a window; it fails, never skips, where there is none."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.fail("chromium and chromedriver are needed: make browser")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    options.unhandled_prompt_behavior = "ignore"
    driver = webdriver.Chrome(options, Service(programs[1]))
    yield driver
    driver.quit()


class Seen:
    """What a page did in the browser."""

    def __init__(self, driver: Any, path: Path) -> None:
        driver.get_log("performance"), driver.get_log("browser")
        driver.get(path.as_uri())
        driver.execute_async_script("setTimeout(arguments[0], 300)")  # pictures and handlers have had their time
        self.hit = driver.execute_script("return window.hit === undefined ? null : window.hit")
        self.text = " ".join((driver.execute_script("return document.documentElement.textContent") or "").split())
        events = [json.loads(each["message"])["message"] for each in driver.get_log("performance")]
        self.requests = {
            event["params"]["request"]["url"].partition(",")[0]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        }
        self.dialogs = [event for event in events if event["method"] == "Page.javascriptDialogOpening"]
        self.console = [each["message"] for each in driver.get_log("browser")]


@pytest.fixture
def visit(browser: Any) -> Callable[[Path], Seen]:
    """Open a page and return what it did."""
    return lambda path: Seen(browser, path)
