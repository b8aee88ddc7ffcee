"""The chat format: `<|start_of_role|>ROLE<|end_of_role|>TEXT<|end_of_text|>` and a line break per message, as a Jinja template.

What transformers' apply_chat_template does with it:

- roles and texts are written as they are; `add_generation_prompt` opens an assistant's turn;
- text and tool calls of an assistant, with the end of text behind them, are what `return_assistant_tokens_mask` marks; the header and the
  line break are not: they are given, not learned;
- tools and documents go into the system message (one is opened when there is none), one JSON object a line between `<tools>` or
  `<documents>` tags; calls are JSON between `<tool_call>` tags; what a tool returned is a user's message between `<tool_response>` tags.

[published] the format of messages and the tags. [assumed: the published wording is not reproduced] the sentences around tools and documents.
A message's text is not searched for control tokens: transformers takes `<|end_of_text|>` inside a message for the token.
"""

TOOLS_TEXT = (
    "You can call the tools that are described below, one JSON object a line, between <tools> and </tools>.\n<tools>",
    "\n</tools>\nTo call a tool, write a JSON object with its name and its arguments between <tool_call> and </tool_call>:\n"
    '<tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>',
)
DOCUMENTS_TEXT = (
    "Answer from the documents that are given below, one JSON object a line, between <documents> and </documents>; say so when they do not "
    "hold the answer.\n<documents>",
    "\n</documents>",
)


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("\n", "\\n").replace("'", "\\'") + "'"


CHAT_TEMPLATE = (
    """\
{#- A message is <|start_of_role|>ROLE<|end_of_role|>TEXT<|end_of_text|> and a line break. -#}
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}
            {%- if part.type != 'text' -%}{{- raise_exception('this chat template takes text only, not ' ~ part.type) -}}{%- endif -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set system = namespace(parts=[]) -%}
{%- set rest = messages -%}
{%- if messages and messages[0].role == 'system' -%}
    {%- set system.parts = [text_of(messages[0].content)] -%}
    {%- set rest = messages[1:] -%}
{%- endif -%}
{%- if tools -%}
    {%- set lines = namespace(text="""
    + _quoted(TOOLS_TEXT[0])
    + """) -%}
    {%- for tool in tools -%}{%- set lines.text = lines.text ~ '\\n' ~ (tool | tojson) -%}{%- endfor -%}
    {%- set system.parts = system.parts + [lines.text ~ """
    + _quoted(TOOLS_TEXT[1])
    + """] -%}
{%- endif -%}
{%- if documents -%}
    {%- set lines = namespace(text="""
    + _quoted(DOCUMENTS_TEXT[0])
    + """) -%}
    {%- for document in documents -%}{%- set lines.text = lines.text ~ '\\n' ~ (document | tojson) -%}{%- endfor -%}
    {%- set system.parts = system.parts + [lines.text ~ """
    + _quoted(DOCUMENTS_TEXT[1])
    + """] -%}
{%- endif -%}
{%- if system.parts -%}
    {{- '<|start_of_role|>system<|end_of_role|>' ~ (system.parts | join('\\n\\n')) ~ '<|end_of_text|>\\n' -}}
{%- endif -%}
{%- for message in rest -%}
    {%- if message.role == 'assistant' -%}
        {{- '<|start_of_role|>assistant<|end_of_role|>' -}}
        {%- generation -%}
        {%- set content = text_of(message.content) -%}
        {{- content -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {{- '\\n' if content or not loop.first else '' -}}
            {{- '<tool_call>\\n{"name": ' ~ (function.name | tojson) ~ ', "arguments": ' -}}
            {{- function.arguments if function.arguments is string else (function.arguments | tojson) -}}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|end_of_text|>' -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '' if loop.previtem and loop.previtem.role == 'tool' else '<|start_of_role|>user<|end_of_role|>' -}}
        {{- '\\n<tool_response>\\n' ~ text_of(message.content) ~ '\\n</tool_response>' -}}
        {{- '' if loop.nextitem and loop.nextitem.role == 'tool' else '<|end_of_text|>\\n' -}}
    {%- else -%}
        {{- '<|start_of_role|>' ~ message.role ~ '<|end_of_role|>' ~ text_of(message.content) ~ '<|end_of_text|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_of_role|>assistant<|end_of_role|>' -}}
{%- endif -%}
"""
)
"""chat_template.jinja of an exported tokenizer."""
