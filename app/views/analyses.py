"""Page: any analysis of the catalogue, its figures and its table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import streamlit as st

from moescope.app import state
from moescope.app.views import choices, layout
from moescope.probe.errors import InputError

if TYPE_CHECKING:
    from moescope.probe.analysis import Analysis, AnalysisTable, Filters, Parameter
    from moescope.probe.figures import Drawing

_ELSEWHERE: Final = ("prompts", "prompt", "token")
"""Analyses that have a page of their own and need a prompt."""
_FIELD_PARAMETERS: Final = ("by", "unit", "phrasing")
_ASKED: Final = "_analyses_asked"


def show() -> None:
    """Draw the page."""
    layout.heading(
        "All analyses",
        "Every question that moescope can ask of a recorded run, with its figures and its table.",
    )
    from moescope.probe.analysis import ANALYSES

    run = state.shown_run()
    names = [name for name in ANALYSES if name not in _ELSEWHERE]
    name = choices.linked_choice(
        "Analysis", names, key="analysis", words=lambda name: ANALYSES[name].title
    )
    analysis = ANALYSES[name]
    st.markdown(f"**{layout.escaped(analysis.question)}**")
    typed, filters = _ask(run, analysis)
    question = json.dumps([run.run_id, name, typed, filters.to_json()], sort_keys=True)
    if st.button("Answer", type="primary", icon=":material/play_arrow:"):
        st.session_state[_ASKED] = question
    if st.session_state.get(_ASKED) != question:
        st.caption(f"On the command line: `{_command(run, analysis, typed, filters)}`")
        return
    with layout.errors_as_sentences():
        arguments = analysis.parse(typed)
        with st.spinner("Computing …", show_time=True):
            table = state.analyze(run, name, filters=filters, **arguments)
        _show(table)


def _ask(run: state.ShownRun, analysis: Analysis) -> tuple[dict[str, str | Sequence[str]], Filters]:
    """What the user asks: parameters as typed on the command line, and filters."""
    fields = state.comparable_fields(run)
    typed: dict[str, str | Sequence[str]] = {}
    shown = [one for one in analysis.parameters if one.required or one.name in ("by", "method")]
    shown += [one for one in analysis.parameters if one.type == "run" and one not in shown]
    if analysis.name == "contrast":
        shown += [one for one in analysis.parameters if one.name in ("a", "b")]
    columns = st.columns(max(2, len(shown) + 1), vertical_alignment="bottom")
    for column, parameter in zip(columns, shown, strict=False):
        with column:
            _put(typed, parameter, _widget(run, analysis, parameter, fields))
    with columns[len(shown)]:
        scopes = choices.scopes_of(run)
        base = analysis.filters.scope
        default = base if base in scopes else scopes[0]
        tokens = choices.choose_scope("tokens", scopes, default)
    rest = [parameter for parameter in analysis.parameters if parameter not in shown]
    with st.expander("Filters and further parameters"):
        kept = choices.conditions(fields, key="analyses")
        layers = st.text_input("Layers", key="analyses_layers", placeholder="all; or 0-3,7")
        for parameter in rest:
            _put(typed, parameter, _widget(run, analysis, parameter, fields))
    given: dict[str, Any] = {"tokens": tokens, "fields": kept}
    if layers.strip():
        from moescope.probe.analysis.filters import parse_layers

        given["layers"] = parse_layers(layers)
    return typed, choices.make_filters(**given)


def _put(
    typed: dict[str, str | Sequence[str]],
    parameter: Parameter,
    value: str | Sequence[str] | None,
) -> None:
    if value is not None and value != "" and value != []:
        typed[parameter.name] = value


def _widget(
    run: state.ShownRun,
    analysis: Analysis,
    parameter: Parameter,
    fields: Mapping[str, Sequence[str]],
) -> str | Sequence[str] | None:
    """One parameter; None where its default holds."""
    key = f"analyses_{analysis.name}_{parameter.name}"
    label = parameter.name.replace("_", " ")
    common: dict[str, Any] = {"key": key, "help": layout.escaped(parameter.help)}
    if parameter.type == "choice":
        options = list(parameter.choices)
        index = options.index(parameter.default) if parameter.default in options else None
        found: str | None = st.selectbox(
            label, options, index=index, placeholder="by the method", **common
        )
        return found
    if parameter.type == "flag":
        return str(st.checkbox(label, value=bool(parameter.default), **common)).lower()
    if parameter.type in ("conditions", "texts"):
        placeholder = "FIELD=VALUE, one a line" if parameter.type == "conditions" else "one a line"
        text = st.text_area(label, height=68, placeholder=placeholder, **common)
        return [line.strip() for line in text.splitlines() if line.strip()]
    if parameter.type == "run":
        others = [name for name in state.all_runs()["run_id"].tolist() if name != run.run_id]
        other: str | None = st.selectbox(
            label, others, placeholder="the store has no other run", **common
        )
        return other
    if parameter.name in _FIELD_PARAMETERS and fields:
        return _field(parameter, fields, label, common)
    default = "" if parameter.default is None else str(parameter.default)
    return str(st.text_input(label, value=default, **common)).strip()


def _field(
    parameter: Parameter,
    fields: Mapping[str, Sequence[str]],
    label: str,
    common: Mapping[str, Any],
) -> str | None:
    """A field of prompts, or of tokens where the analysis takes them."""
    from moescope.probe.analysis.token_fields import TOKEN_FIELDS

    options = list(fields)
    if parameter.name == "unit":
        options = list(dict.fromkeys([str(parameter.default), *options]))
    elif "of tokens" in parameter.help:
        options += list(TOKEN_FIELDS)
    default = parameter.default if parameter.default in options else None
    index = options.index(default) if default is not None else 0 if parameter.required else None
    found: str | None = st.selectbox(label, options, index=index, placeholder="not split", **common)
    return found


def _show(table: AnalysisTable) -> None:
    """Figures, single numbers and rows."""
    from moescope.probe.figures import drawings_of

    drawings = drawings_of(table)
    if table.summary:
        numbers = {
            name.replace("_", " "): value
            for name, value in table.summary.items()
            if isinstance(value, int | float)
        }
        st.caption(" · ".join(f"{name}: {value:,.4g}" for name, value in numbers.items()))
    if drawings:
        tabs = st.tabs([drawing.label for drawing in drawings])
        for index, (tab, drawing) in enumerate(zip(tabs, drawings, strict=True)):
            with tab, layout.errors_as_sentences():
                _draw(table, drawing, f"analyses_{table.name}_{index}")
    layout.show_table(table, key=f"analyses_{table.name}", height=420)


def _draw(table: AnalysisTable, drawing: Drawing, key: str) -> None:
    """One figure, under the choices that it needs."""
    chosen: dict[str, Any] = {}
    if drawing.choices:
        columns = st.columns([1] * len(drawing.choices) + [3])
        for column, name in zip(columns, drawing.choices, strict=False):
            options = drawing.options(table, chosen)[name]
            if not options:
                raise InputError(f"the table has no {name} to draw")
            first = len(options) // 2 if name == "layer" else 0
            with column:
                chosen[name] = st.selectbox(name, options, index=first, key=f"{key}_{name}")
    figure = drawing(table, **chosen)
    layout.show_figure(figure, key=key, alt=f"{table.title}: {drawing.label}")


def _command(
    run: state.ShownRun,
    analysis: Analysis,
    typed: Mapping[str, str | Sequence[str]],
    filters: Filters,
) -> str:
    """The same question on the command line, defaults left out."""
    words = ["moescope", "analyze", analysis.name, "--store", str(run.store), "--run", run.run_id]
    for parameter in analysis.parameters:
        value = typed.get(parameter.name)
        if value is None or value in (str(parameter.default), str(parameter.default).lower()):
            continue
        for text in [value] if isinstance(value, str) else value:
            words += [f"--{parameter.name.replace('_', '-')}", text]
    for name, values in filters.fields.items():
        words += ["--where", f"{name}={','.join(values)}"]
    if filters.scope != analysis.filters.scope:
        words += ["--tokens", filters.scope]
    if filters.layers is not None:
        words += ["--layers", ",".join(map(str, filters.layers))]
    return shlex.join(words)


if __name__ == "__main__":
    show()
