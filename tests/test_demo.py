"""The demo: what it shows, and the page in a headless browser (skipped without gradio, selenium or chromium)."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import demo
import figures.side_by_side as side_by_side
from config import UserError, load_config, to_dict
from data.features import open_features
from figures.side_by_side import Choice, SideBySide
from models import build_model
from sampling import hub
from sampling.budgets import Budget
from sampling.generate import SamplingOptions, generate_images
from sampling.load import load_trained
from weights.checkpoint import save_checkpoint

ROOT = Path(__file__).parent.parent
BROWSER, DRIVER = (shutil.which("chromium") or shutil.which("google-chrome")), shutil.which("chromedriver")
PATIENCE = 120  # seconds


def save_random(config, folder: Path) -> Path:
    """Checkpoint of a random model; a router keeps half of its tokens."""
    model = build_model(config)
    with torch.no_grad():
        if not config.is_static and config.model.router == "learned":
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
    """Of what is behind the page, without a page: half of the tokens against all of them."""
    trained = load_trained(save_random(load_config(tiny_config), tmp_path))
    drawing = SideBySide(trained, 3, "ddim")
    *_, last = drawing.views(Choice(1, 0, 2.0, 0.5, 0.8), 0)
    assert last.image.shape == last.full_image.shape == last.chunk_map.probability.shape == (288, 288, 3)
    assert not np.array_equal(last.image, last.full_image)
    assert float(last.cost.split()[0]) < float(last.full_cost.split()[0])
    assert re.search(r"TFLOP, \S+ ms, peak memory \d+ MB, .* of the time$", last.cost)

    # The same as sampling without a page
    options = SamplingOptions(cfg_scale=2.0, num_sampling_steps=3, sampler="ddim")
    budgets = {"budget": Budget.fraction(0.5), "uncond": Budget.fraction(0.8)}
    for shown, own in ((last.full_image, options), (last.image, replace(options, **budgets))):
        (image,) = generate_images(trained, [1], own)
        assert np.array_equal(shown[::9, ::9], image.permute(1, 2, 0).numpy())


def test_the_first_sight_of_a_sample_comes_early(tiny_config, tmp_path, monkeypatch):
    """After one step of the first of two samples; each look shows more steps, and the chunk map of the latest."""
    monkeypatch.setattr(side_by_side, "PAUSE", 0.0)
    monkeypatch.setattr(side_by_side, "PATIENCE", 0.0)
    trained = load_trained(save_random(load_config(tiny_config), tmp_path))
    choice = Choice(1, 0, 2.0, 0.5, 0.8)
    drawing = SideBySide(trained, 4, "ddim")
    views = list(drawing.views(choice, 999))
    seen = [(view.progress[0], len(view.progress[1].steps)) for view in views if view.progress]
    first = [("at the budget", done) for done in (1, 2, 3, 4)]
    assert seen == [*first, *(("nothing dropped", done) for _, done in first), ("both samples", 4)]
    assert 'value="1"' in demo.progress_bar(*views[1].progress)
    latest = [int(view.chunk_map.sentence.split()[2][:-1]) for view in views[1:4]]
    assert latest == sorted(latest, reverse=True)

    # The chunk map at any t, of the sample that is remembered
    assert views[-1].chunk_map.sentence.startswith("t = 999: ")
    step = drawing.remembered[choice].steps[-1]
    kept = int(step.keep.sum())
    assert drawing.chunk_map(choice, 0).sentence.startswith(f"t = {step.t}: {kept} of 64 tokens kept")


def test_without_a_checkpoint_a_shipped_model_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "ASSETS", tmp_path)
    with pytest.raises(UserError, match="--ckpt is missing, and assets/ holds no model; run `bash scripts/"):
        demo.parse([])
    for name in ("shapes", "emoji"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    assert demo.parse([]).ckpt == str(tmp_path / "shapes")
    assert capsys.readouterr().out == f"--ckpt {tmp_path / 'shapes'}; or {tmp_path / 'emoji'}\n"
    assert demo.parse(["--ckpt", "other.pt"]).ckpt == "other.pt"


def test_classes_are_chosen_by_name():
    assert demo.class_choices(3, ["cat", "dog"]) == {"cat": 0, "dog": 1, "2": 2}
    assert demo.class_choices(2, ["cat", "cat"]) == {"0: cat": 0, "1: cat": 1}


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
for (const key of ["image", "full_image", "probability", "kept"])
  found[key] = document.querySelector(`#${key} img`)?.src;
for (const key of ["cost", "full_cost", "at_t"])
  found[key] = document.querySelector(`#${key} textarea, #${key} input`)?.value;
found.progress = document.querySelector("#progress")?.innerText;
return found;
"""
FETCH = """
const [source, done] = arguments, reader = new FileReader();
reader.onload = () => done(reader.result);
fetch(source).then(answer => answer.blob()).then(blob => reader.readAsDataURL(blob));
"""


def look(browser) -> dict[str, str] | None:
    """The pictures' addresses and the texts on the page, or None until both samples are finished."""
    found = browser.execute_script(LOOK)
    return found if "both samples: finished" in (found["progress"] or "") else None


def pixels(browser, source: str) -> str:
    """The file behind a picture's address."""
    return browser.execute_async_script(FETCH, source)


def test_the_sliders_change_what_is_shown(page, browser):
    """That of the budget the picture and its cost, and nothing of the sample beside it; that of t the chunk map."""
    browser.get(page)
    before = wait_for(lambda: look(browser))
    assert all(before.values())
    shown = {key: pixels(browser, before[key]) for key in ("image", "full_image", "kept")}

    # The End key: as much as a slider offers
    browser.find_element("css selector", "#timestep input[type=range]").send_keys("\ue010")
    wait_for(lambda: look(browser)["at_t"].startswith("t = 999: "))
    wait_for(lambda: pixels(browser, look(browser)["kept"]) != shown["kept"])
    assert look(browser)["cost"] == before["cost"]

    browser.find_element("css selector", "#dropped input[type=range]").send_keys("\ue010")
    after = wait_for(lambda: (seen := look(browser)) and seen["cost"] != before["cost"] and seen)
    costs = [float(text.split()[0]) for text in (after["cost"], before["cost"], after["full_cost"])]
    assert costs == sorted(costs) and len(set(costs)) == 3
    assert after["full_cost"] == before["full_cost"]
    wait_for(lambda: pixels(browser, look(browser)["image"]) != shown["image"])
    assert pixels(browser, look(browser)["full_image"]) == shown["full_image"]

    # Another seed changes both; after Backspace there is no seed for a moment
    browser.find_element("css selector", "#seed input").send_keys("\ue0033")
    wait_for(lambda: (seen := look(browser)) and pixels(browser, seen["full_image"]) != shown["full_image"])


def test_the_api_takes_what_it_documents(page):
    """A class by its name; the answer is that of the page."""
    client = pytest.importorskip("gradio_client").Client(page, verbose=False)
    documented = client.view_api(return_format="dict")["named_endpoints"]
    for name, number_of_outputs in (("/sample", 8), ("/chunk_map", 3)):
        given = {}
        for parameter in documented[name]["parameters"]:
            is_class = parameter["parameter_name"] == "class_name"
            given[parameter["parameter_name"]] = (
                parameter["type"]["enum"][1] if is_class else parameter["parameter_default"]
            )
        assert (
            list(given) == ["class_name", "seed", "guidance", "dropped", "uncond_dropped", "t"]
            and given["class_name"] == "b"
        )
        assert len(client.predict(**given, api_name=name)) == number_of_outputs
    assert [output["label"] for output in documented["/sample"]["returns"]][2:] == [
        "cost", "cost, nothing dropped", "boundary probability at t", "kept tokens at t", "at t", "progress",
    ]  # fmt: skip
