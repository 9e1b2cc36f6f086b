"""Give every page a footer with version, citation and licence; typeset formulas; prepare examples for the copy button."""

import html
import re
import runpy
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
as_mathml = runpy.run_path(str(HERE / "formulas.py"))["as_mathml"]
TRACEBACK = re.compile(
    r'(<span class="gt">.*?)(?=\n<span class="gp">|\n?</code>)', re.DOTALL
)
# The last line of a function or another block, before the next statement.
BLOCK_END = re.compile(
    r'(<span class="gp">\.\.\. </span> {4}.*\n)(?=<span class="gp">&gt;)'
)
FORMULA = re.compile(
    r'<pre class="formula"><code>(.*?)</code></pre>', re.DOTALL
)


def on_config(config):
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())
    version, files = (
        project["project"]["version"],
        f"{config.repo_url}/blob/main",
    )
    config.copyright = (
        f"jaxsoft {version} · <a href='{files}/CITATION.cff'>cite</a> "
        f"· <a href='{files}/LICENSE'>Apache-2.0</a>"
    )
    return config


def on_page_content(content, page, **_):
    content = TRACEBACK.sub(r'<span class="go">\1</span>', content)
    content = BLOCK_END.sub(r'\1<span class="copied">\n</span>', content)
    content = FORMULA.sub(_as_formula, content)
    if page.file.src_uri.endswith(".py"):
        name = Path(page.file.src_uri).name
        content += (
            f'<p><a href="{name}" download>Download this notebook</a></p>'
        )
    return content


def _as_formula(block: re.Match) -> str:
    text = html.unescape(re.sub(r"<[^>]+>", "", block[1])).strip()
    return f'<div class="formula">{as_mathml(text)}</div>'
