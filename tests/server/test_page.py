"""The page at ``/``, in a headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai", "selenium"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras server and test")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("needs Chromium and chromedriver on PATH", allow_module_level=True)

from helpers.serving import Gate, Served, letter_engine, serving, until  # noqa: E402
from selenium.webdriver import Chrome, ChromeOptions, Keys  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402

if TYPE_CHECKING:
    from selenium.webdriver.remote.webelement import WebElement

ATTACK = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


class Page:
    """The page as a user has it before them."""

    def __init__(self, driver: Chrome, url: str) -> None:
        self.driver = driver
        self.url = url
        driver.get(url)

    def at(self, name: str) -> WebElement:
        return self.driver.find_element("id", name)

    def text(self, name: str) -> str:
        return str(self.at(name).text)

    def fill(self, **values: object) -> None:
        for name, value in values.items():
            field = self.at(name)
            field.clear()
            field.send_keys(str(value))

    def rows(self) -> list[tuple[str, list[str]]]:
        """Class and cells of each line of the table."""
        found: list[tuple[str, list[str]]] = self.driver.execute_script(
            "return [...document.querySelectorAll('#rows tr')]"
            ".map(tr => [tr.className, [...tr.cells].map(td => td.textContent)])"
        )
        return [(kind, cells) for kind, cells in found if kind]

    def idle(self) -> bool:
        return self.at("run").is_enabled()

    def run(self, **values: object) -> None:
        self.fill(**values)
        self.at("run").click()
        until(self.idle)

    def console(self) -> list[dict[str, Any]]:
        """What was written to the console since the last call, the user's own 400 aside."""
        return [line for line in self.driver.get_log("browser") if "status of 400" not in str(line)]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    gate = Gate()
    with serving(letter_engine(gate), gate) as served:
        yield served


@pytest.fixture(scope="module")
def driver() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def page(driver: Chrome, served: Served) -> Iterator[Page]:
    """A page that writes nothing to the console and asks no other host."""
    page = Page(driver, served.url)
    yield page
    assert page.console() == []
    asked = driver.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert all(name.startswith((f"{served.url}/", "data:")) for name in asked)
    until(served.idle)


def test_accepted_and_rejected_segments_with_their_rewards(page: Page) -> None:
    page.run(prompt="ab", max_tokens=12, seed=24, target_reward=1.5)
    kept = [cells for kind, cells in page.rows() if kind.startswith("kept")]
    lost = [cells for kind, cells in page.rows() if kind == "lost"]
    assert [cells[0] for cells in kept] == ["0-4", "4-8", "8-12"]
    assert len(lost) >= 2
    text = "".join(cells[1] for cells in kept)
    assert page.text("text") == "ab" + text
    upto = ""
    for kind, cells in page.rows():
        # Of the letters: the reward that the server's function gives them.
        score = (upto + cells[1]).count("a") - (upto + cells[1]).count("b")
        assert float(cells[2]) == score / 2
        assert float(cells[3]) > 0
        assert cells[4] == {
            "lost": "rejected", "kept": "accepted", "kept fallback": "best of those"
        }[kind]  # fmt: skip
        upto += cells[1] if kind != "lost" else ""
    assert {kind for kind, _ in page.rows()} == {"lost", "kept", "kept fallback"}
    assert page.text("status").startswith(f"3 segments kept, {len(lost)} attempts rejected; 12 tok")
    assert page.text("error") == ""


def test_segments_are_shown_as_they_come_and_stop_ends_it(page: Page, served: Served) -> None:
    gate = served.gate
    reward, rounds = gate.reward, list[int]()
    try:

        def waits(prompts: list[str], responses: list[str]) -> list[float]:
            if any(responses):  # a segment, not the prompt's own reward
                rounds.append(1)
            if len(rounds) == 3:
                gate.open.clear()
            return reward(prompts, responses)

        gate.reward = waits  # type: ignore[method-assign]
        page.fill(prompt="ab", max_tokens=40, seed=1, target_reward=-9)
        page.at("prompt").send_keys(Keys.CONTROL, Keys.ENTER)
        until(lambda: len(page.rows()) == 2)
        assert not page.idle()
        assert page.text("text") == "ab" + "".join(cells[1] for _, cells in page.rows())
        page.at("prompt").send_keys(Keys.CONTROL, Keys.ENTER)  # does not start a second one
        assert served.engine.num_running == 1
        page.at("stop").click()
        until(page.idle)
        assert page.text("status") == "stopped; 2 segments kept, 0 attempts rejected"
        assert page.text("error") == ""
    finally:
        gate.reward = reward  # type: ignore[method-assign]
        gate.open.set()
    until(served.idle)
    page.run(max_tokens=4)
    assert [cells[0] for _, cells in page.rows()] == ["0-4"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 0}, "beta must be above 0 with soft acceptance, got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -1}, "temperature must be at least 0, got -1"),
        ({"prompt": "c"}, "no reward for c"),
    ],
)
def test_errors_are_shown_and_gone_with_the_next_run(
    page: Page, values: dict[str, object], message: str
) -> None:
    page.run(**({"prompt": "ab", "max_tokens": 4} | values))
    assert message in page.text("error")
    assert page.rows() == []
    page.driver.refresh()
    page.run(prompt="ab", max_tokens=4)
    assert page.text("error") == ""
    assert page.rows()


def test_markup_is_text(page: Page) -> None:
    page.run(prompt=ATTACK, stop_text=ATTACK, max_tokens=4)
    assert page.text("text").startswith(ATTACK)
    assert page.rows()
    # From a server, in the places where one may write: text, a rejected attempt, an error.
    page.driver.execute_script(
        """
        const lost = {text: arguments[0], reward: 0};
        const segment = {start: 0, end: 1, reward: 1, accepted: "test", rejected: [lost]};
        show({choices: [{text: arguments[0], stars: {segments: [segment]}}]});
        """,
        ATTACK,
    )
    assert [cells[1] for _, cells in page.rows()[-2:]] == [ATTACK, ATTACK]
    assert (
        page.driver.find_elements("css selector", "main img, main script, #text *:not(span)") == []
    )
    assert page.driver.title == "stars_fast"


def test_the_policy_runs_no_other_script(page: Page) -> None:
    page.driver.execute_script(
        "const other = document.createElement('script');"
        "other.textContent = 'document.title = `taken`';"
        "document.body.append(other);"
    )
    assert page.driver.title == "stars_fast"
    (line,) = page.console()
    assert "Content Security Policy" in line["message"]


def test_the_policy_lets_nothing_else_in(page: Page, served: Served) -> None:
    def fetched(url: str) -> Any:
        return page.driver.execute_async_script(
            "fetch(arguments[0], {mode: 'no-cors'})"
            ".then(() => arguments[1]('sent'), () => arguments[1]('refused'))",
            url,
        )

    assert fetched("health") == "sent"
    assert fetched(served.url.replace("127.0.0.1", "localhost") + "/health") == "refused"
    lines = page.console()
    assert lines
    assert all("Content Security Policy" in line["message"] for line in lines)


@pytest.mark.parametrize("width", [320, 800, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(page: Page, width: int, scheme: str) -> None:
    command = page.driver.execute_cdp_cmd
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    command("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    command("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        page.run(prompt="ab" * 60, max_tokens=8, seed=3, target_reward=9, beta=0.01)
        assert {kind for kind, _ in page.rows()} == {"lost", "kept fallback"}
        assert page.driver.execute_script(
            "return document.documentElement.scrollWidth <= innerWidth"
        )
        for place in ("#status", "#given", ".lost .text", ".lost .state", ".kept .state", "label"):
            assert page.driver.execute_script(CONTRAST, place) >= 4.5, place
    finally:
        command("Emulation.clearDeviceMetricsOverride", {})
        command("Emulation.setEmulatedMedia", {"features": []})


#: Contrast of an element's text with the page's background (WCAG 2.2, relative luminance).
CONTRAST = """
const probe = document.createElement("p");
probe.style.backgroundColor = "Canvas";
document.body.append(probe);
const light = colour => {
  const [r, g, b] = colour.match(/[0-9.]+/g).map(Number).map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const pair = [getComputedStyle(document.querySelector(arguments[0])).color,
              getComputedStyle(probe).backgroundColor].map(light).sort((a, b) => b - a);
probe.remove();
return (pair[0] + 0.05) / (pair[1] + 0.05);
"""
