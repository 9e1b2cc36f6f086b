"""Of every page: version, citation and licence at its foot, and tracebacks as output, which the copy button skips."""

import re
import tomllib
from pathlib import Path


def on_config(config):
    version = tomllib.loads(
        Path(config.config_file_path).with_name("pyproject.toml").read_text()
    )["project"]["version"]
    files = f"{config.repo_url}/blob/main"
    config.copyright = f"jaxsoft {version} · <a href='{files}/CITATION.cff'>cite</a> · <a href='{files}/LICENSE'>Apache-2.0</a>"
    return config


def on_page_content(html, **_):
    traceback = r'(<span class="gt">.*?)(?=\n<span class="gp">|\n?</code>)'
    return re.sub(
        traceback, r'<span class="go">\1</span>', html, flags=re.DOTALL
    )
