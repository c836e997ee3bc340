"""The frame of our pages: the title is text, style and body go in as they are, and nothing may be loaded or run."""

import base64

import pytest

from data_pipeline.page import embedded, page, readable_size


def test_title_is_escaped_and_braces_survive() -> None:
    html = page("</title><script>1</script> {style}", "b { color: red; }\n", "<p>{body} %s</p>\n")
    assert "<title>&lt;/title&gt;&lt;script&gt;1&lt;/script&gt; {style}</title>" in html
    assert "\nb { color: red; }\n</style>" in html
    assert html.endswith("\n<p>{body} %s</p>\n</html>\n")
    assert "default-src 'none'" in html


def test_embedded_holds_every_byte() -> None:
    data = bytes(range(256))
    kind, _, text = embedded("image/png", data).partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(text) == data


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 19, "1.5 MiB"),
        (5 << 30, "5.0 GiB"),
        (1 << 52, "4096.0 TiB"),
    ],
)
def test_readable_size(size: int, text: str) -> None:
    assert readable_size(size) == text
