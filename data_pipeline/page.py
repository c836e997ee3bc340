"""The frame of every HTML page we write: one file with nothing outside it, harmless, light and dark, fit for a phone.

The page forbids itself every script and every request (Content-Security-Policy), so whatever slips through in captions
or names stays inert. Colours are variables set here once; a page adds the style of its own parts.
"""

from __future__ import annotations

import base64
from html import escape


def page(title: str, style: str, body: str) -> str:
    """A whole HTML document; `title` is plain text, `style` CSS, `body` HTML in which strange text is escaped."""
    return FRAME.format(title=escape(title), style=style.strip(), body=body.strip())


def embedded(kind: str, data: bytes) -> str:
    """A file as a `data:` address, for `src`: `kind` is its media type, such as "image/png"."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def readable_size(size: float) -> str:
    """Bytes as "812 B", "3.4 KiB", "1.2 GiB"."""
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


FRAME = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --page: #f4f3ef; --card: #fff; --ink: #22211e; --soft: #77736a; --line: #e3e0d8;
  --well: #eeece6; --label: #2b5f8a; --bad: #b3261e; --good: #2c6e2f; --warm: #a8500f; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #171614; --card: #22201d; --ink: #ebe8e1; --soft: #98938a;
  --line: #36332e; --well: #1b1a17; --label: #8fbfe6; --bad: #ff8a80; --good: #93cf8f; --warm: #f0a868; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1480px; padding: 28px 24px 48px; background: var(--page); color: var(--ink);
  font: 14px/1.45 system-ui, sans-serif; }}
h1 {{ margin: 0; font-size: 22px; font-weight: 650; overflow-wrap: anywhere; }}
header p {{ margin: 2px 0 22px; color: var(--soft); }}
p {{ margin: 0 0 6px; overflow-wrap: anywhere; unicode-bidi: isolate; }}
.none {{ color: var(--soft); font-style: italic; }}
.bad {{ color: var(--bad); font-size: 12px; padding: 8px; }}
{style}
</style>
{body}
</html>
"""
