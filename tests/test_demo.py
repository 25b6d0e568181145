"""The demo: what it shows, and the page in a headless browser (skipped without gradio, selenium or chromium)."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

import demo
from config import UserError, load_config, to_dict
from data.features import open_features
from figures.side_by_side import side_by_side
from models import build_model
from sampling.load import load_trained
from weights.checkpoint import save_checkpoint

ROOT = Path(__file__).parent.parent
BROWSER, DRIVER = (shutil.which("chromium") or shutil.which("google-chrome")), shutil.which("chromedriver")
PATIENCE = 120  # seconds


def save_random(config, folder: Path) -> Path:
    """Checkpoint of a random model; a router keeps half of its tokens."""
    model = build_model(config)
    with torch.no_grad():
        if not config.is_static:
            model.router.residual_scorer[-1].bias.zero_()
        for parameter in (*model.final_layer.parameters(), *model.blocks[0].adaLN_modulation.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.1)  # they start at zero: no budget would show
    store = open_features(config.data.feature_path, 32)
    state = {"autoencoder": store.autoencoder, "class_names": store.class_names, "optimizer": {}, "step": 1}
    return save_checkpoint(
        folder,
        state | {"config": to_dict(config), "model": model.state_dict(), "ema": model.state_dict()},
        keep=0,
    )


def test_pictures_and_costs(tiny_config, tmp_path):
    """Of the function behind the page, without a page: half of the tokens against all of them."""
    trained = load_trained(save_random(load_config(tiny_config), tmp_path))
    draw_pair = side_by_side(trained, 3, "ddim")
    pair = draw_pair(1, 0, 2.0, 0.5)
    assert pair.image.shape == pair.boundaries.shape == pair.full_image.shape == (288, 288, 3)
    assert not np.array_equal(pair.image, pair.full_image)
    assert float(pair.cost.split()[0]) < float(pair.full_cost.split()[0])
    assert re.search(r"TFLOP, \S+ ms, peak memory \d+ MB, .* of the time$", pair.cost)
    assert np.array_equal(draw_pair(1, 0, 2.0, 0.0).image, pair.full_image)


def test_a_static_model_is_refused(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "import_gradio", lambda: None)
    ckpt = save_random(load_config(tiny_config, ["model.patch_size=2"]), tmp_path)
    with pytest.raises(UserError, match="is a static DiT, which has no budget to show"):
        demo.main(["--ckpt", str(ckpt)])


@pytest.fixture
def page(tiny_config, tmp_path):
    """Address of the demo of a random model."""
    pytest.importorskip("gradio")
    ckpt = save_random(load_config(tiny_config), tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    command = [
        sys.executable,
        "demo.py",
        "--ckpt",
        str(ckpt),
        "--num-sampling-steps",
        "3",
        "--port",
        str(port),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(address) or process.poll() is not None)
        assert process.poll() is None, process.stderr.read()[-2000:]
        yield address
    finally:
        process.terminate()
        process.wait(30)


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


def wait_for(condition):
    """The first true value of a function that is asked again and again."""
    patience = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < patience, "waited too long"
        time.sleep(0.2)
    return value


@pytest.fixture
def browser():
    selenium = pytest.importorskip("selenium.webdriver")
    if not (BROWSER and DRIVER):
        pytest.skip("no chromium with chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


LOOK = """
const found = {};
for (const key of ["image", "boundaries", "full_image"]) found[key] = document.querySelector(`#${key} img`)?.src;
for (const key of ["cost", "full_cost"])
  found[key] = document.querySelector(`#${key} textarea, #${key} input`)?.value;
return found;
"""
FETCH = """
const [source, done] = arguments, reader = new FileReader();
reader.onload = () => done(reader.result);
fetch(source).then(answer => answer.blob()).then(blob => reader.readAsDataURL(blob));
"""


def look(browser) -> dict[str, str] | None:
    """The pictures' addresses and the costs on the page, or None until all are there."""
    found = browser.execute_script(LOOK)
    return (
        found
        if all(found.get(key) for key in ("image", "boundaries", "full_image", "cost", "full_cost"))
        else None
    )


def pixels(browser, source: str) -> str:
    """The file behind a picture's address."""
    return browser.execute_async_script(FETCH, source)


def test_the_slider_changes_picture_and_cost(page, browser):
    """And nothing of the sample at full cost beside it; another seed changes both."""
    browser.get(page)
    before = wait_for(lambda: look(browser))
    shown = {key: pixels(browser, before[key]) for key in ("image", "boundaries", "full_image")}
    slider = browser.find_element("css selector", "#dropped input[type=range]")
    slider.send_keys("\ue010")  # the End key: as much as the page offers
    after = wait_for(lambda: (seen := look(browser)) and seen["cost"] != before["cost"] and seen)
    cheaper, cost, full = (
        float(text.split()[0]) for text in (after["cost"], before["cost"], after["full_cost"])
    )
    assert cheaper < cost < full
    assert after["full_cost"] == before["full_cost"]
    wait_for(lambda: pixels(browser, look(browser)["image"]) != shown["image"])
    assert pixels(browser, look(browser)["full_image"]) == shown["full_image"]
    browser.find_element("css selector", "#seed input").send_keys(
        "\ue0033"
    )  # Backspace: for a moment there is no seed
    wait_for(lambda: pixels(browser, look(browser)["full_image"]) != shown["full_image"])
