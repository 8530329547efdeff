"""HTML answers -> Markdown. The judge of benchmarks/fidelity.py: markdown-it-py reads ours, html.parser the page."""

import gzip
import html
import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from benchmarks.fidelity import differences
from pipelines.html import CONVERTERS, Converted, convert_answer, looks_like_page
from schemas.conversation import Drop
from schemas.pipeline_config import CleanConfig

# Raw HTML off, as chat renderers have it: a literal "<" is text.
COMMONMARK = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
COPY = '<button class="flex gap-1 items-center"><svg viewBox="0 0 1 1"><path d="M1"></path></svg>Copier le code</button>'


def page(inner: str) -> str:
    return f'<div class="markdown prose w-full break-words dark:prose-invert dark">{inner}</div>'


def markdown(inner: str, **settings: object) -> str:
    converted = convert_answer(page(inner), CleanConfig(**settings))
    assert isinstance(converted, Converted), converted
    return converted.markdown


def old_code(code: str, *, bar: str = "python", classes: str = "hljs language-python") -> str:
    return (
        f'<pre><div class="bg-black rounded-md"><div class="flex items-center"><span>{bar}</span>{COPY}</div>'
        f'<div class="p-4 overflow-y-auto"><code class="!whitespace-pre {classes}">{code}</code></div></div></pre>'
    )


def editor_code(lines: list[str], *, bar: str = "", nested: bool = False) -> str:
    inner = "<br>".join(f'<span class="ͼ8">{line}</span>' for line in lines)
    content = (
        f'<pre class="cm-content m-0"><code>{inner}</code></pre>'
        if nested
        else f'<div class="cm-content q9">{inner}</div>'
    )
    button = '<button aria-label="Sao chép"><svg></svg></button>'
    return (
        f'<pre class="overflow-visible! px-0!" data-start="1"><div class="sticky"><div><svg></svg>{bar}</div>'
        f'<div>{button}</div></div><div class="cm-editor"><div class="cm-scroller">{content}</div></div></pre>'
    )


def katex(tex: str, *, display: bool = False) -> str:
    formula = (
        f'<span class="katex"><span class="katex-mathml"><math><semantics><mrow><mi>X</mi></mrow>'
        f'<annotation encoding="application/x-tex">{html.escape(tex)}</annotation></semantics></math></span>'
        f'<span class="katex-html" aria-hidden="true"><span class="base">X</span></span></span>'
    )
    return f'<span class="katex-display">{formula}</span>' if display else formula


CASES = {
    "code with a bar": (old_code("a = 1\n\n  b_c*d"), "```python\na = 1\n\n  b_c*d\n```"),
    "code without a language": (old_code("x", bar="", classes="whitespace-pre!"), "```\nx\n```"),
    "language of the bar alone": (old_code("x", bar="Objective-C", classes=""), "```objectivec\nx\n```"),
    "highlighted code unescaped once": (
        old_code(
            '<span class="hljs-tag">&lt;/<span class="hljs-name">p</span>&gt;</span> &amp;lt;', bar="html"
        ),
        "```python\n</p> &lt;\n```",
    ),
    "editor code": (
        editor_code(["def f():", "    return 1"], bar="Python"),
        "```python\ndef f():\n    return 1\n```",
    ),
    "editor code in a second pre": (editor_code(["a", "", "b"], nested=True), "```\na\n\nb\n```"),
    "plain pre": ("<pre>a\n  b</pre>", "```\na\n  b\n```"),
    "pre with text beside its code": ("<pre>run <code>x</code> now</pre>", "```\nrun x now\n```"),
    "fence in code": (old_code("```\nx\n````\n", bar=""), "`````python\n```\nx\n````\n`````"),
    "code in an item": (
        f"<ol><li><p>Do:</p>{old_code('if a:&#10;&#10;    b&#10;')}</li><li><p>Done</p></li></ol>",
        "1. Do:\n\n   ```python\n   if a:\n\n       b\n   ```\n\n2. Done",
    ),
    "inline formula": (f"<p>so {katex('a_1 < b')} holds</p>", "so $a_1 < b$ holds"),
    "displayed formula in a paragraph": (
        f"<p>so {katex('x^2', display=True)} holds</p>",
        "so\n\n$$\nx^2\n$$\n\nholds",
    ),
    "displayed formula after a list": (f"<ul><li>a</li></ul>{katex('y', display=True)}", "- a\n\n$$\ny\n$$"),
    "displayed formula in an item": (
        f"<ul><li>a{katex('y', display=True)}</li></ul>",
        "- a\n\n  $$\n  y\n  $$",
    ),
    "list going on": ('<h3>T</h3><ol start="6"><li>six</li><li>seven</li></ol>', "### T\n\n6. six\n7. seven"),
    "list in a list": (
        "<ol><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ol>",
        "1. a\n   - b\n     - c\n2. d",
    ),
    "list beside its item": ("<ul><li>a</li><ul><li>b</li></ul></ul>", "- a\n  - b"),
    "items with offsets are tight": (
        '<ul data-start="0"><li data-start="0" data-end="3"><p data-start="2">a</p></li>\n'
        '<li data-start="4" data-end="7"><p>b</p></li></ul>',
        "- a\n- b",
    ),
    "items with offsets are loose": (
        '<ul><li data-start="0" data-end="3"><p>a</p></li>\n<li data-start="5" data-end="8"><p>b</p></li></ul>',
        "- a\n\n- b",
    ),
    "tasks": (
        '<ul class="contains-task-list"><li class="task-list-item"><p><input disabled="" type="checkbox"> a</p></li>'
        '<li class="task-list-item"><input type="checkbox" checked="" disabled="">b</li></ul>',
        "- [ ] a\n\n- [x] b",
    ),
    "table": (
        "<div><div><table><thead><tr><th>A|B</th><th><strong>C</strong></th></tr></thead><tbody><tr>"
        "<td><code>a|b</code></td><td>x<br>y</td></tr><tr><td>one</td></tr></tbody></table></div></div>",
        "| A\\|B | **C** |\n| --- | --- |\n| `a\\|b` | x<br>y |\n| one |  |",
    ),
    "table in an item": (
        "<ul><li>a<table><tr><th>h</th></tr><tr><td>d</td></tr></table></li></ul>",
        "- a\n\n  | h |\n  | --- |\n  | d |",
    ),
    "quote": (
        f"<blockquote><p>a</p><ul><li>b</li></ul><p>c</p>{old_code('d&#10;&#10;e')}</blockquote>",
        "> a\n>\n> - b\n>\n> c\n>\n> ```python\n> d\n>\n> e\n> ```",
    ),
    "white space between blocks": (
        '\n<p data-start="0">a</p>\n\n<hr data-start="3">\n<p>b</p>\n',
        "a\n\n---\n\nb",
    ),
    "line breaks": ("<p>a<br>\nb</p>", "a  \nb"),
    "carousel of pictures": (
        '<div><button><img alt="https://e.org/x.png" src="./f/th"></button></div><p>a</p>',
        "a",
    ),
    "frames, scripts, styles": (
        "<iframe src='x'>no</iframe><script>no</script><style>no</style><p>a</p>",
        "a",
    ),
    "citation pill": (
        '<p>Fact.\u200b <span data-state="closed"><span data-testid="webpage-citation-pill"><a href="https://e.org">'
        '<span class="flex"><span class="grow truncate">e.org</span><span>+3</span></span></a></span></span></p>',
        "Fact.",
    ),
    "citation pill without its name": (
        '<p>Fact.<span class="ms-1"><a href="https://e.org"><span><span class="truncate">e</span></span></a></span></p>',
        "Fact.",
    ),
    "link": (
        '<p><a href="https://e.org/?utm_source=chatgpt.com">e_f</a></p>',
        "[e_f](https://e.org/?utm_source=chatgpt.com)",
    ),
    "address as its own link": (
        '<p><a href="https://e.org/a_b">https://e.org/a_b</a></p>',
        "<https://e.org/a_b>",
    ),
    "address with odd brackets": ('<p><a href="https://e.org/a(b">x</a></p>', "[x](<https://e.org/a(b>)"),
    "script behind a link": (
        '<p><a href=" java\nscript:alert(1)">x</a> <a href="data:text/html,y">y</a></p>',
        "x y",
    ),
    "zero-width spaces": ("<p>a\u200bb</p>", "ab"),
    "no-break space kept": ("<p>100\u00a0% vrai\u202f!\u3000</p>", "100\u00a0% vrai\u202f!"),
    "link over two lines": ('<p><a href="https://e.org">a<br>b </a>c</p>', "[a  \nb](https://e.org) c"),
    "link around blocks": (
        '<a href="u"><div>a</div><p><em>b</em> c</p></a><p>d</p>',
        "[a](u)\n\n[*b* c](u)\n\nd",
    ),
    "brackets in a link, exclamation before": ('<p>!<a href="u">[a</a></p>', "\\![\\[a](u)"),
    "mail address": ('<p><a href="mailto:a@e.org">a@e.org</a></p>', "<a@e.org>"),
    "punctuation in emphasis before a letter": (
        "<p><strong>注意：</strong>字<em>「引」</em>用</p>",
        "**注意**：字「*引*」用",
    ),
    "emphasis around code before a letter": ("<p>a<strong><code>b</code></strong>c</p>", "a`b`c"),
    "neighbours of emphasis": ("<p><strong>a</strong><em>b</em> \\<em>c</em></p>", "**a***b* \\\\*c*"),
    "tags as text": (
        "<p>&lt;div<br>&lt;!-- c --&gt; &lt;a b=1&gt; a &lt;b &lt;/p&gt;</p>",
        "\\<div  \n\\<!-- c --> \\<a b=1> a <b \\</p>",
    ),
    "dollars beside a formula": (f"<p>$5 {katex('x')}2</p>", "\\$5 $x$ 2"),
    "dollars without formulas": ("<p>$5 or $x$</p>", "$5 or $x$"),
    "half a formula": (f"<p>{katex('a ' + chr(92))}</p>", "a \\"),
    "a list behind a list": (
        '<ul><li>a</li></ul><ul><li>b<ul><li>c</li></ul></li></ul><ol><li>d</li></ol><ol start="3"><li>e</li></ol>',
        "- a\n\n+ b\n  - c\n\n1. d\n\n3) e",
    ),
    "empty items": ("<ol><li></li><li>a</li></ol>", "1.\n2. a"),
    "cells over several rows and columns": (
        "<table><tr><th>a</th><th>b</th><th>c</th></tr><tr><td rowspan=2>d</td><td colspan=2>e</td></tr>"
        "<tr><td>f</td><td>g</td></tr></table>",
        "| a | b | c |\n| --- | --- | --- |\n| d | e |  |\n|  | f | g |",
    ),
    "a table's rule as text": ("<p>a | b<br>--- | ---</p>", "a | b  \n\\--- | ---"),
    "code beside code": ("<p><code>a</code><code>b</code></p>", "`a` `b`"),
    "names stay bare": (
        "<p>my_var and snake_case_name, 2 * 3 * 4, C#</p>",
        "my_var and snake_case_name, 2 * 3 * 4, C#",
    ),
    "angle brackets stay": (
        "<p>List&lt;String&gt; and x &lt; y &amp;&amp; z &gt; w</p>",
        "List\\<String> and x < y && z > w",
    ),
    "stars that would be emphasis": ("<p>*not* so</p>", "\\*not\\* so"),
    "paragraph like a list": ("<p>1. not</p><p># not</p><p>- not</p>", "1\\. not\n\n\\# not\n\n\\- not"),
    "heading like a list": ("<h2>1. Title</h2>", "## 1. Title"),
    "emphasis with blanks inside": ("<p>a<strong> b </strong>c <em></em>d</p>", "a **b** c d"),
    "emphasis in itself": ("<p><strong>a <b>b</b></strong></p>", "**a b**"),
    "inline code with back-ticks": ("<p><code>a`b</code> <code>`</code></p>", "``a`b`` `` ` ``"),
    "details": ("<details><summary>More</summary><p>a</p></details>", "**More**\n\na"),
    "exponents": ("<p>x<sup>2</sup></p>", "x<sup>2</sup>"),
    "footnotes": (
        '<p>a<sup><a href="#user-content-fn-1" data-footnote-ref="">1</a></sup></p><section class="footnotes">'
        '<h2 class="sr-only">Footnotes</h2><ol><li id="fn-1"><p>b <a href="#fnref-1" data-footnote-backref="">↩</a></p>'
        "</li></ol></section>",
        "a[^1]\n\n[^1]: b",
    ),
    "text of unknown elements": ("<p>a <custom-thing>b</custom-thing></p>", "a b"),
}


@pytest.mark.parametrize(("inner", "expected"), CASES.values(), ids=CASES.keys())
def test_markup_of_the_page_becomes_markdown(inner: str, expected: str) -> None:
    assert markdown(inner) == expected


@pytest.mark.parametrize(
    "name",
    [
        "code in an item",
        "table",
        "quote",
        "names stay bare",
        "list in a list",
        "a list behind a list",
        "empty items",
    ],
)
def test_both_converters_write_what_reads_the_same(name: str) -> None:
    rendered = {
        converter: COMMONMARK.render(markdown(CASES[name][0], converter=converter))
        for converter in CONVERTERS
    }
    tight = {re.sub(r"\s+|</?p>", "", text) for text in rendered.values()}
    assert len(tight) == 1


PILL = (
    '<span data-state="closed"><span data-testid="webpage-citation-pill"><a href="https://e.org/p?utm_source=chatgpt.com">'
    '<span class="flex"><span class="grow truncate">e.org</span><span class="-me-1">+3</span></span></a></span></span>'
)
RELATIVES = {
    "no code element": (
        f"<pre><div>python{COPY}</div><div>a = 1\n  b</div></pre>",
        "```python\na = 1\n  b\n```",
    ),
    "no code element, button in a box of its own": (
        f'<pre><div><div>C++</div><div class="sticky">{COPY}</div><div><span>a</span>\n  b</div></div></pre>',
        "```cpp\na\n  b\n```",
    ),
    "a button of another element": (
        '<pre><div><span>js</span><div role="button">Bearbeiten</div></div><code>a</code></pre>',
        "```js\na\n```",
    ),
    "a code element for every line": (
        f"<pre><div><span>js</span>{COPY}</div><div><code>a\n</code><code>b</code></div></pre>",
        "```js\na\nb\n```",
    ),
    "code in code": ("<pre><code><span>a</span><code>b</code></code></pre>", "```\nab\n```"),
    "one line and a button below": (f"<pre><div>ls -la</div><div>{COPY}</div></pre>", "```\nls -la\n```"),
    "nothing but a button": (f"<pre><div>{COPY}</div></pre>", "```\n```"),
    "an editor's lines as elements": (
        '<pre><div class="cm-gutters">1</div><div class="cm-content"><div class="cm-line">a</div>'
        '<div class="cm-line"><br></div><div class="cm-line">  b</div></div></pre>',
        "```\na\n\n  b\n```",
    ),
    "counter of edits": (
        f"<div>{COPY}<span> 2 / 3 </span>{COPY}</div><p>2 / 3</p><p><span>2 / 3</span> of it</p>",
        "2 / 3\n\n2 / 3 of it",
    ),
    "lines of preformatted prose": (
        '<div class="whitespace-pre-wrap">a\nb\n\n*c*</div>',
        "a  \nb\n\n\\*c\\*",
    ),
    "lines that begin with emphasis in an item": (
        "<ul><li><p>a<br><strong>b</strong></p><p>c</p></li></ul>",
        "- a  \n  **b**\n\n  c",
    ),
    "code blocks in a cell": (
        "<table><tr><th>h</th></tr><tr><td><pre>a\nb</pre><pre>c</pre></td></tr></table>",
        "| h |\n| --- |\n| `a b` `c` |",
    ),
    "a root that holds nothing but lines": ("a\n- b\n\nc", "a  \n\\- b\n\nc"),
    "emoji as a picture": ('<p>a <img class="emoji" alt="😀" src="x"></p>', "a 😀"),
    "citation": (f"<p>Fact.{PILL} Next.</p>", "Fact. Next."),
    "formulas with their source beside": (
        '<p>a <span data-math-source="x^2"><span class="katex">x2</span></span></p><div data-math-source="y&lt;1">y1</div>',
        "a $x^2$\n\n$$\ny<1\n$$",
    ),
    "a formula with controls": (
        f'<div data-testid="math-block-layout"><span>Drag</span><div>{katex("z", display=True)}</div><label>0.5</label></div>',
        "$$\nz\n$$",
    ),
    "footnotes in a list": (
        '<ul><li>a<sup><a href="#fn-1" data-footnote-ref="">1</a></sup></li></ul><section class="footnotes"><ol>'
        "<li><p>b</p></li></ol></section>",
        "- a[^1]\n\n[^1]: b",
    ),
    "details with code": (
        f"<details><summary>More</summary>{old_code('x')}</details>",
        "**More**\n\n```python\nx\n```",
    ),
    "language classes of many kinds": (
        '<pre><code class="lang-c++ hljs">x</code></pre><pre class="language-vbnet"><code>y</code></pre>',
        "```c++\nx\n```\n\n```vbnet\ny\n```",
    ),
    "twice escaped": ("<p>&amp;lt;b&amp;gt;</p>", "\\&lt;b\\&gt;"),
}


@pytest.mark.parametrize("converter", CONVERTERS)
@pytest.mark.parametrize(("inner", "expected"), RELATIVES.values(), ids=RELATIVES.keys())
def test_relatives_of_known_markup_are_understood(inner: str, expected: str, converter: str) -> None:
    written = markdown(inner, converter=converter)
    assert written == expected
    assert differences(page(inner), written) == []


def test_citations_are_links_where_the_setting_says_so() -> None:
    kept = markdown(f"<p>Fact.{PILL} Next.</p>", citations="keep")
    assert kept == "Fact. [e.org](https://e.org/p?utm_source=chatgpt.com) Next."
    assert differences(page(f"<p>Fact.{PILL} Next.</p>"), kept, citations="keep") == []


@pytest.mark.parametrize(
    ("images", "expected"),
    [("drop", "a"), ("alt", "a A cat"), ("keep", "a ![A cat](https://e.org/c.png) ![](https://e.org/d.png)")],
)
def test_pictures_follow_the_setting(images: str, expected: str) -> None:
    pictures = (
        '<img alt="A cat" src="https://e.org/c.png"> <img alt="https://e.org/d.png" src="./dead/local">'
    )
    assert markdown(f"<p>a {pictures}</p>", images=images) == expected


def test_only_the_answer_is_read_where_the_page_stands_around_it() -> None:
    around = f"<div><span>2 / 2</span>{page('<p>answer</p>')}<div>Regenerate</div></div>"
    assert convert_answer(around, CleanConfig()) == Converted("answer", is_unfinished=False)


def test_private_use_characters_of_the_answer_survive() -> None:
    text = "\ue000 1 \ue001 \ue055 *a* \uf8ff &#xe002;"
    assert (
        markdown(f"<p>{text}</p><pre>\ue000</pre>")
        == "\ue000 1 \ue001 \ue055 \\*a\\* \uf8ff \ue002\n\n```\n\ue000\n```"
    )


@pytest.mark.parametrize(
    ("attributes", "is_unfinished"),
    [
        ('class="result-streaming markdown prose"', True),
        ('class="result-thinking markdown prose"', True),
        ('class="request-:R2d6:-19 light text-red-500 flex"', True),
        ('class="streaming-animation markdown prose"', False),
    ],
)
def test_markup_says_that_an_answer_is_unfinished(attributes: str, is_unfinished: bool) -> None:
    converted = convert_answer(f"<div {attributes}><p>It</p></div>", CleanConfig())
    assert converted == Converted("It", is_unfinished=is_unfinished)


# ------------------------------------------------------------------------------------------------- what is HTML


@pytest.mark.parametrize(
    "text",
    [
        page("<p>a</p>"),
        f"\n {page('<p>a</p>')} \n",
        '<div\n class="request-:r0:-3 markdown prose"><p>a</p></div>',
        '<div class="flex"><div class="markdown prose"><p>a</p></div></div>',
        f'<article data-turn="assistant"><div class="{"x " * 500}"><div class="markdown"><p>a</p></div></div></article>',
        '<div dir="auto" data-message-author-role="assistant"><p>a</p></div>',
        '<div data-markdown-text-style="assistant-message"><p>a</p></div>',
        "<p>Hello</p><ul><li>a</li></ul>",
        "<ol>\n<li>a</li>\n</ol>\n<p>b</p>",
        '<pre><code class="language-js">x</code></pre>',
    ],
)
def test_an_answer_that_is_html_as_a_whole_is_taken_as_such(text: str) -> None:
    assert looks_like_page(text)


@pytest.mark.parametrize(
    "text",
    [
        "Use `<div class='markdown'>` here.",
        '```html\n<div class="markdown prose"><p>a</p></div>\n```',
        'Try this:\n<div class="box"><p>a</p></div>',
        '<div class="box">\n  <p>a</p>\n</div>',
        '<div id="app"><p>a</p></div>',
        "<!DOCTYPE html>\n<html><body><p>a</p></body></html>",
        "<p>a</p>\n\n```js\nx\n```\n<p>b</p>",
        "<p>a</p> and then prose <p>b</p>",
        "<b>Note</b> this is Markdown",
        "<think>hm</think>",
        "a < b and c > d",
        "",
    ],
)
def test_an_answer_that_holds_html_or_is_source_code_stays_text(text: str) -> None:
    assert not looks_like_page(text)


# ------------------------------------------------------------------------------------------------- hostile input


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (page("<p>" + "word " * 500_000), "html_too_large"),
        (page("<div>" * 1_000 + "x" + "</div>" * 1_000), "html_too_deep"),
        (page("<div>" * 100_000), "html_too_deep"),
        ("<p>" + "<b></i></p>" * 60_000, "html_unparsable"),
        (page("<a " * 300_000), "html_unparsable"),
        (page("<p " + " ".join(f"a{i}" for i in range(18_000)) + ">x</p>"), "html_too_large"),
        (page("<p>" + "".join(f"<b id={i}>" for i in range(1_400)) + "<p>x" * 1_400), "html_too_deep"),
        (
            page("<p>" + "".join(f'<b id="{i}">' for i in range(99)) + "<p>x</p>" * 9_000 + "</b>" * 99),
            "html_too_large",
        ),
        (page("<table>" + '<tr><td colspan="9999">x</td></tr>' * 2_000 + "</table>"), "html_too_large"),
        (page("<blockquote><p>x</p></blockquote>" * 50_000), "html_too_large"),
        (page("<ul><li>x" * 120 + "<p>word</p>" * 90_000 + "</li></ul>" * 120), "html_too_large"),
        *((page(f"<{tag}>" * 100_000), "html_too_deep") for tag in ("b", "blockquote", "ul", "span")),
        ("<!--" * 200_000, "html_unparsable"),
        (page("<p>" + "<x>" * 300_000), "html_too_deep"),
        ("<" * 500_000, "html_too_large"),
    ],
    ids=lambda value: value if len(value) < 30 else "",
)
def test_hostile_markup_is_dropped_at_once(text: str, reason: str) -> None:
    start = time.process_time()
    outcome = convert_answer(text, CleanConfig())
    assert isinstance(outcome, Drop)
    assert outcome.reason == reason
    assert time.process_time() - start < 2


@pytest.mark.parametrize("converter", CONVERTERS)
@pytest.mark.parametrize(
    "text",
    [
        page("<a " * 2_900),
        "<div>" * 240 + '<p class="markdown">x</p>' * 10_000 + "</div>" * 240,
        page('<a href="u">' + "<div>n</div>" * 8_000 + "</a>"),
        page("<p>" + "x<b>：</b>y" * 10_000 + "</p>"),
        page("<pre>" + "<div>" * 200 + "<code>x</code>" * 10_000 + "</div>" * 200 + "</pre>"),
    ],
    ids=["stray", "many roots", "blocks in a link", "hard emphasis", "codes"],
)
def test_what_is_odd_but_allowed_takes_seconds_at_most(text: str, converter: str) -> None:
    start = time.process_time()
    assert isinstance(convert_answer(text, CleanConfig(converter=converter)), Converted)
    assert time.process_time() - start < 5


def test_a_converter_that_loses_text_drops_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONVERTERS, "markdownify", lambda text: "only this")
    outcome = convert_answer(page("<p>only this is not all</p>"), CleanConfig(converter="markdownify"))
    assert isinstance(outcome, Drop)
    assert outcome.reason == "html_unparsable"
    assert "isnotall" in outcome.detail


def test_a_panic_of_a_library_drops_the_chat_and_an_interrupt_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class PanicException(BaseException):  # the name that pyo3 gives to a Rust panic
        pass

    def fail(error: BaseException) -> None:
        raise error

    monkeypatch.setitem(CONVERTERS, "markdownify", lambda text: fail(PanicException("boom")))
    outcome = convert_answer(page("<p>a</p>"), CleanConfig(converter="markdownify"))
    assert isinstance(outcome, Drop)
    assert outcome.detail == "PanicException: boom"
    monkeypatch.setitem(CONVERTERS, "markdownify", lambda text: fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        convert_answer(page("<p>a</p>"), CleanConfig(converter="markdownify"))


# ------------------------------------------------------------------------------------------------- any page

_WORDS = (
    "word a_b __init__ * ** 2*3*4 ` `` [x](y) [a] # ## 1. 12) - + > = --- === ~~ ~~x~~ \\ \\* \\( &lt; &amp; <div> </b> "
    "List<String> a|b | $5 x\u00a0y 中文 é ... ![i](u) <https://x.y> http://x.y/a_b C# #tag &copy ``` ~~~ *a* _b_ \ue000 <?php <!--x--> <b </p> | --- :--- $ $x$ 「是」 ： ! [^1] [^1]:"
).split(" ")
_text = st.lists(st.sampled_from(_WORDS), min_size=1, max_size=5).map(
    lambda words: html.escape(" ".join(words))
)
_styled = st.tuples(
    st.sampled_from(["strong", "em", "del"]),
    st.sampled_from(["one", "two_x", "3 C", "是：", "(x)", "~", " a", "*"]),
)
_inline = st.one_of(
    _text,
    _text,
    _styled.map(lambda pair: f"<{pair[0]}>{pair[1]}</{pair[0]}>"),
    st.text("ab `|\\*<", min_size=1, max_size=8)
    .filter(str.strip)
    .map(lambda c: f"<code>{html.escape(c)}</code>"),
    st.sampled_from(["ah<br>oh", "ah<br><em>oh</em>", "<strong>a<br></strong>b"]),
    st.sampled_from(
        ['<a href="https://e.org/a_(b)">link text</a>', "<a href='x y'>[z]!</a>", '<a href="m:a">m:a</a>']
    ),
    st.just(katex("a_1 < b")),
)
_run = st.tuples(st.sampled_from([" ", " ", ""]), st.lists(_inline, min_size=1, max_size=4)).map(
    lambda pair: pair[0].join(pair[1])
)
_pre = st.text("ab \n\t`~<>&*_|\\#-1.é", min_size=1, max_size=30).map(
    lambda code: old_code(html.escape(code))
)


def _table(rows: list[list[str]]) -> str:
    head, *body = ["".join(f"<{'td' if number else 'th'}>{cell}</{'td' if number else 'th'}>" for cell in row)
                   for number, row in enumerate(rows)]  # fmt: skip
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in body)}</tbody></table>"


def _containers(blocks: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    several = st.lists(blocks, min_size=1, max_size=3).map("".join)
    item = st.one_of(_run, several, st.tuples(_run, several).map("".join))
    items = st.lists(item, min_size=1, max_size=3).map(
        lambda found: "".join(f"<li>{item}</li>" for item in found)
    )
    lists = st.tuples(st.sampled_from(["ul", "ol", 'ol start="9"']), items)
    return st.one_of(
        lists.map(lambda pair: f"<{pair[0]}>{pair[1]}</{pair[0][:2]}>"),
        several.map(lambda inner: f"<blockquote>{inner}</blockquote>"),
    )


_leaf = st.one_of(
    _run.map(lambda run: f"<p>{run}</p>"),
    _run.map(lambda run: f"<h2>{run}</h2>"),
    _pre,
    st.just("<hr>"),
    st.integers(1, 3).flatmap(
        lambda width: st.lists(st.lists(_run, min_size=width, max_size=width), min_size=1, max_size=3).map(
            _table
        )
    ),
)
_pages = (
    st.lists(st.recursive(_leaf, _containers, max_leaves=6), min_size=1, max_size=4).map("".join).map(page)
)


@settings(max_examples=150)
@given(_pages)
@example(page("<p>\ue000<strong>(x)</strong></p>"))
@example(page("<p><strong>是：</strong>\ue000</p>"))
@example(page("<p>की<strong>(x)</strong>है, <em>“y”</em>की</p>"))
def test_any_page_reads_the_same_in_markdown(source: str) -> None:
    converted = convert_answer(source, CleanConfig())
    assert isinstance(converted, Converted), converted
    assert differences(source, converted.markdown) == []


@settings(max_examples=40)
@given(_pages)
def test_any_page_reads_the_same_by_the_other_converter(source: str) -> None:
    converted = convert_answer(source, CleanConfig(converter="markdownify"))
    assert isinstance(converted, Converted), converted
    assert differences(source, converted.markdown) == []


@settings(max_examples=200)
@given(st.text("<>/=\"'&;# \nabdiplvu-!\x00\u200b\ue000", max_size=80))
def test_no_text_breaks_the_conversion(source: str) -> None:
    assert isinstance(convert_answer(source, CleanConfig()), Converted | Drop)
    looks_like_page(source)


# ------------------------------------------------------------------------------------------------- real pages


@pytest.fixture(scope="module")
def answers(real_data: Path) -> dict[str, str]:
    chats = json.loads(gzip.decompress((real_data / "sharegpt_html.json.gz").read_bytes()))
    turns = [(f"{chat['id']}#{i}", turn) for chat in chats for i, turn in enumerate(chat["conversations"])]
    return {place: turn["value"] for place, turn in turns if turn["from"] != "human"}


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize(("converter", "min_share"), [("html-to-markdown", 0.995), ("markdownify", 0.98)])
def test_real_answers_read_the_same_in_markdown(
    answers: dict[str, str], converter: str, min_share: float
) -> None:
    faults: dict[str, list[str]] = {}
    for place, source in answers.items():
        converted = convert_answer(source, CleanConfig(converter=converter))
        assert isinstance(converted, Converted), (place, converted)
        if found := differences(source, converted.markdown):
            faults[place] = found
    print(
        f"{converter}: {len(answers) - len(faults)} of {len(answers)} answers without a difference; {faults}"
    )
    assert 1 - len(faults) / len(answers) >= min_share


@pytest.mark.real_data
def test_real_answers_are_seen_as_html_and_real_markdown_is_not(
    answers: dict[str, str], real_data: Path
) -> None:
    assert all(looks_like_page(source) for source in answers.values())
    chats = json.loads(gzip.decompress((real_data / "sharegpt_v3_sample.json.gz").read_bytes()))
    texts = [turn["value"] for chat in chats for turn in chat["conversations"] if turn["from"] == "gpt"]
    assert sum("<div class" in text for text in texts) >= 25
    assert not any(looks_like_page(text) for text in texts)
