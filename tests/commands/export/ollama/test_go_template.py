"""The renderer of Go templates: what it prints is what Go's text/template 1.19 has printed for the same."""

import pytest

from dpo_wrapper.commands.export.ollama.go_template import GoMessage, GoTemplate, GoTemplateError

MESSAGES = [GoMessage("system", "S"), GoMessage("user", "U"), GoMessage("assistant", "A", "T")]


def render(text: str) -> str:
    return GoTemplate(text).render({"Messages": MESSAGES, "System": "S"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('a {{- "x" -}} b', "axb"),
        ('a {{ "x" }} b', "a x b"),
        ('a\n\t {{- "x" -}} \n\nb', "axb"),
        ('{{ "\\n\\"{{\\u00e4" }}', '\n"{{ä'),
        ("{{ .System }}{{ .Missing }}", "S<no value>"),
        ("{{ len .Messages }}{{ len (slice .Messages 1) }}{{ len (slice .Messages 0 1) }}", "321"),
        ("{{ (index .Messages 2).Thinking }}", "T"),
        ("{{ range .Messages }}{{ .Role }}:{{ .Content }} {{ end }}", "system:S user:U assistant:A "),
        ("{{ range $m := .Messages }}{{ $m.Content }}{{ $.System }}{{ end }}", "SSUSAS"),
        ("{{ range $i, $_ := .Messages }}{{ $i }}{{ eq $i 1 }} {{ end }}", "0false 1true 2false "),
        ("{{ if eq 1 2 }}a{{ else if eq 2 2 }}b{{ else }}c{{ end }}d", "bd"),
        ("{{ if eq 1 2 }}a{{ else if eq 2 3 }}b{{ else }}c{{ end }}d", "cd"),
        ("{{ if eq 1 2 }}a{{ else if eq 2 3 }}b{{ end }}d", "d"),
        ('{{ if and .System (ne .System "x") (not .Missing) }}a{{ end }}', "a"),
        ('{{ or .Missing "" "x" "y" }}{{ and 1 0 }}', "x0"),
        ('{{ eq "b" "a" "b" }}', "true"),
        ("{{ $x := 1 }}{{ if true }}{{ $x = 2 }}{{ end }}{{ $x }}", "2"),
        ("{{ $x := 1 }}{{ if true }}{{ $x := 2 }}{{ $x }}{{ end }}{{ $x }}", "21"),
        ("{{ gt 2 1 }}{{ lt 2 1 }}", "truefalse"),
    ],
)
def test_renders(text: str, expected: str) -> None:
    assert render(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "{{ if .System }}a",
        "a{{ end }}",
        "{{ else }}",
        "{{ upper .System }}",
        "{{ .System .System }}",
        "{{ eq }}",
        "{{ (len .Messages }}",
        "{{ len .Messages) }}",
        "{{ $x }}",
        "{{ $x = 1 }}",
        "{{ range .Messages }}{{ .Contents }}{{ end }}",
        "{{ index .Messages 3 }}",
        "{{ .System",
        "{{ ' }}",
        '{{ "\\x" }}',
        "{{ }}",
    ],
)
def test_refuses_what_go_refuses(text: str) -> None:
    with pytest.raises(GoTemplateError):
        render(text)
