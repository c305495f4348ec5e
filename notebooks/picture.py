"""Makes the README's pictures of the live view, of the question that notebook 2 asks:

  python notebooks/picture.py [--browser chromium]

live_view_light.webp and live_view_dark.webp show every step twice, as the live view does: while its guesses are
checked, and afterwards. Needs a Chromium, in whose window the frames are drawn, and pillow (which
matplotlib brings).
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

import medusa_apar
from medusa_apar import display
from medusa_apar.display.picture import Picture

HERE = Path(__file__).resolve().parent
QUESTION, TOKENS = "How do I prepare for a job interview?", 220
WIDTH, HEIGHT = 980, 372  # of a frame, in pixels
AT_ONCE = 20  # frames of one screenshot: taller ones a browser does not draw
STEP_MS, LAST_MS = 300, 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", default="chromium", help="default: %(default)s")
    browser = parser.parse_args().browser
    apar = medusa_apar.load("smollm2-135m", speculation="forest", budget=24)
    chat = [{"role": "user", "content": QUESTION}]
    inputs = apar.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = apar.generate(**inputs, max_new_tokens=TOKENS, return_dict_in_generate=True)

    every = [
        display.lanes(output, step, checking=checking)
        for step in range(1, output.recording.step + 1)
        for checking in (True, False)
    ]
    durations = [STEP_MS] * (len(every) - 1) + [LAST_MS]
    for theme in ("light", "dark"):
        frames: list[Image.Image] = []
        for first in range(0, len(every), AT_ONCE):
            drawn = every[first : first + AT_ONCE]
            sheet = screenshot(browser, drawn, dark=theme == "dark")
            frames += [sheet.crop((0, HEIGHT * k, WIDTH, HEIGHT * (k + 1))) for k in range(len(drawn))]
        frames[0].save(
            HERE / f"live_view_{theme}.webp",
            save_all=True,
            append_images=frames[1:],
            duration=durations,
            loop=0,
            lossless=True,
            method=6,
        )


def screenshot(browser: str, pictures: list[Picture], dark: bool) -> Image.Image:
    """A screenshot of pictures one below the other, each in a box of the same size."""
    boxes = [f'<div style="height:{HEIGHT}px;overflow:hidden">{picture.body}</div>' for picture in pictures]
    page = Picture("".join(boxes), "").page(margin="8px")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "page.html", Path(folder) / "page.png"
        source.write_text(page, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=1"]
        options += [f"--window-size={WIDTH},{HEIGHT * len(pictures)}", f"--screenshot={target}"]
        options += ["--blink-settings=preferredColorScheme=0"] if dark else []
        subprocess.run([browser, *options, source.as_uri()], check=True, capture_output=True)
        return Image.open(target).convert("RGB").copy()


if __name__ == "__main__":
    main()
