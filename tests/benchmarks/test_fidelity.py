"""The judge of conversions finds damage of every kind, and none where there is none."""

import pytest

from benchmarks.fidelity import differences
from benchmarks.fidelity_page import read_page

CODE = (
    '<pre><div class="flex"><span>python</span><button>Copier le code</button></div><div class="p-4">'
    '<code class="hljs language-python">def f(a):\n    <span class="hljs-keyword">return</span> a &lt; 1  # é\n</code>'
    "</div></pre>"
)
EDITOR = (
    '<pre><div><svg></svg>Java</div><div class="cm-editor"><div class="cm-scroller"><div class="cm-content">'
    '<span class="ͼ8">int</span> a;<br>b();</div></div></div></pre>'
)
KATEX = (
    '<span class="{}"><span class="katex"><span class="katex-mathml"><math><semantics><mi>x</mi><annotation>{}'
    '</annotation></semantics></math></span><span class="katex-html" aria-hidden="true">x</span></span></span>'
)
PILL = (
    '<span data-testid="webpage-citation-pill"><a href="https://e.org/p"><span class="truncate">e.org</span><span>+1'
    "</span></a></span>"
)
PAGE = f"""<div class="markdown prose"><button><img alt="https://e.org/i.png" src="./dead"></button>
<h2>Title <em>two</em></h2><p>One word, <strong>bold</strong> and <code>a  b</code>.{PILL}</p>{CODE}
<ol start="4"><li>four<ul><li>deep<ul><li>deeper</li></ul></li><li>x</li></ul></li><li><p>five</p>{EDITOR}</li></ol>
<p>So {KATEX.format("inline", "a_1^2 &lt; b")} and</p>{KATEX.format("katex-display", "x = 1")}
<table><thead><tr><th>A</th><th>B</th></tr></thead><tbody><tr><td>1|2</td><td></td></tr><tr><td>3</td><td>4</td></tr>
</tbody></table><blockquote><p>quoted</p></blockquote><hr>
<p>See <a href="https://e.org/a_b?c=1">the page</a>, List&lt;String&gt; and $5. <img alt="A cat" src="https://e.org/c.png"></p>
<ul class="contains-task-list"><li><input type="checkbox" checked="">done</li></ul>
<p>Note<sup><a href="#fn-1" data-footnote-ref="">1</a></sup></p><section class="footnotes"><ol><li><p>The note.
<a data-footnote-backref="">↩</a></p></li></ol></section></div>"""
MARKDOWN = """## Title *two*

One word, **bold** and `a  b`.

```python
def f(a):
    return a < 1  # é
```

4. four
   - deep
     - deeper
   - x

5. five

   ```java
   int a;
   b();
   ```

So $a_1^2 < b$ and

$$
x = 1
$$

| A | B |
| --- | --- |
| 1\\|2 |  |
| 3 | 4 |

> quoted

---

See [the page](https://e.org/a_b?c=1), List\\<String> and \\$5.

- [x] done

Note[^1]

[^1]: The note.
"""
DAMAGES = {
    "a byte of code": ("return a < 1", "return a <= 1", "code"),
    "a blank of indentation": ("    return", "   return", "code"),
    "a character of code that looks alike": ("# é", "# e\u0301", "code"),
    "a language": ("```java\n", "```\n", "code"),
    "code fallen out of its item": (
        "   ```java\n   int a;\n   b();\n   ```",
        "```java\nint a;\nb();\n```",
        "lists",
    ),
    "a code bar left in": ("```python\n", "```python\nCopier le code\n", "code"),
    "a blank of inline code": ("`a  b`", "`a b`", "inline_code"),
    "inline code made text": ("`a  b`", "a  b", "inline_code"),
    "a lost cell": ("| 3 | 4 |", "| 3 |  |", "cells"),
    "two cells exchanged": ("| 3 | 4 |", "| 4 | 3 |", "cells"),
    "a cell cut in two": ("1\\|2", "1|2", "cells"),
    "a lost row": ("| 3 | 4 |\n", "", "cells"),
    "the start of a list": ("4. four", "1. four", "lists"),
    "a kind of list": ("   - x\n", "   1. x\n", "lists"),
    "nesting": ("     - deeper", "   - deeper", "lists"),
    "a lost item": ("   - x\n", "", "lists"),
    "an item's text in another": ("   - x\n", "     x\n", "lists"),
    "a level of heading": ("## Title", "### Title", "headings"),
    "a heading made text": ("## Title", "Title", "headings"),
    "a link's address": ("a_b?c=1)", "a_b?c=2)", "links"),
    "a lost link": ("[the page](https://e.org/a_b?c=1)", "the page", "links"),
    "a letter of a formula": ("a_1^2", "a_1^3", "formulas"),
    "a displayed formula made inline": ("$$\nx = 1\n$$", "$x = 1$", "formulas"),
    "a lost formula": ("$$\nx = 1\n$$\n", "", "formulas"),
    "a lost word": ("One word", "One", "text"),
    "a word twice": ("One word", "One word word", "text"),
    "a letter's case": ("One word", "one word", "text"),
    "two words exchanged": ("One word", "word One", "text"),
    "a type argument that a reader takes for a tag": ("List\\<String>", "List<String>", "text"),
    "a citation left in": ("`.\n", "`. e.org+1\n", "text"),
    "a picture left in": ("and \\$5.", "and \\$5. ![A cat](https://e.org/c.png)", "images"),
    "a task undone": ("[x] done", "[ ] done", "text"),
    "a quote made text": ("> quoted", "quoted", "quotes"),
    "a lost rule": ("---\n\nSee", "See", "rules"),
    "a lost footnote": ("[^1]: The note.\n", "", "footnotes"),
    "emphasis on another word": ("One word, **bold**", "**One** word, bold", "style"),
}


def test_a_faithful_conversion_has_no_difference() -> None:
    assert differences(PAGE, MARKDOWN) == []
    assert differences(PAGE, MARKDOWN.replace("- x\n\n5.", "- x\n5.").replace("One word", "One\nword")) == []


@pytest.mark.parametrize(("old", "new", "facet"), DAMAGES.values(), ids=DAMAGES.keys())
def test_every_planted_damage_is_found(old: str, new: str, facet: str) -> None:
    assert len(DAMAGES) >= 20
    assert MARKDOWN.count(old) == 1
    found = differences(PAGE, MARKDOWN.replace(old, new))
    assert facet in [line.split(":")[0] for line in found]


def test_pictures_and_citations_are_counted_and_judged_by_their_setting() -> None:
    reading = read_page(PAGE)
    assert (reading.num_images, reading.num_citations) == (2, 1)
    kept = MARKDOWN.replace("and \\$5.", "and \\$5. ![A cat](https://e.org/c.png)")
    assert differences(PAGE, kept, images="keep") == []
    assert differences(PAGE, MARKDOWN.replace("and \\$5.", "and \\$5. A cat"), images="alt") == []
    assert differences(PAGE, MARKDOWN, images="keep") != []
    cited = MARKDOWN.replace("`.\n", "`. [e.org](https://e.org/p)\n")
    assert differences(PAGE, cited, citations="keep") == []
    assert differences(PAGE, MARKDOWN, citations="keep") != []
