"""Templates with tools and reasoning, each in the manner of a family of models."""

HERMES = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}"
    "{{- '# Tools\\n\\n<tools>' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}"
    "{{- '\\n</tools><|im_end|>\\n' }}"
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- set ns = namespace(last_query=messages | length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages | length - 1) - loop.index0 %}"
    "{%- if message.role == 'user' and ns.last_query == messages | length - 1 and not ns.found %}"
    "{%- set ns.last_query = index %}{%- set ns.found = true %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}"
    "{%- set content = message.content if message.content is string else '' %}"
    "{%- set reasoning = '' %}"
    "{%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}"
    "{%- for call in message.tool_calls or [] %}"
    "{%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}"
    "{%- if call.function %}{%- set call = call.function %}{%- endif %}"
    '{{- \'<tool_call>\\n{"name": "\' + call.name + \'", "arguments": \' }}'
    "{%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}"
    "{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""As Qwen 3: an empty block of reasoning in the last answer, none in answers before the last question."""

LLAMA = (
    "{{- '<|begin_of_text|>' }}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday is ' + strftime_now('%d %b %Y') + '\\n\\n' }}"
    "{%- if tools %}{%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}{%- endif %}"
    "{{- system + '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{%- if not (message.role == 'tool' or 'tool_calls' in message) %}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}"
    "{%- elif 'tool_calls' in message %}"
    "{%- if message.tool_calls | length != 1 %}{{- raise_exception('only single tool-calls at once') }}{%- endif %}"
    "{%- set call = message.tool_calls[0].function %}"
    '{{- \'<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "\' + call.name + \'", "parameters": \' }}'
    "{{- call.arguments | tojson + '}<|eot_id|>' }}"
    "{%- else %}{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
"""As Llama 3.1: a date, one call a turn, text beside a call left out, tool results as JSON strings."""

MISTRAL = (
    "{{- bos_token }}{%- set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{%- set turns = messages[1:] if system else messages %}"
    "{%- set last = turns | selectattr('role', 'equalto', 'user') | list | last %}"
    "{%- for message in turns %}{%- if message.role == 'user' %}"
    "{%- if tools and message == last %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{{- '[INST] ' + (system + '\\n\\n' if system and loop.last else '') + message.content + '[/INST]' }}"
    "{%- elif message.tool_calls is defined and message.tool_calls %}{{- '[TOOL_CALLS] [' }}"
    "{%- for call in message.tool_calls %}"
    '{{- \'{"name": "\' + call.function.name + \'", "arguments": \' + call.function.arguments | tojson }}'
    "{%- if call.id is not defined or call.id | length != 9 %}{{- raise_exception('ids have length 9') }}{%- endif %}"
    "{{- ', \"id\": \"' + call.id + '\"}' + (']' + eos_token if loop.last else ', ') }}{%- endfor %}"
    "{%- elif message.role == 'assistant' %}{{- ' ' + message.content | trim + eos_token }}"
    "{%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS] {\"content\": ' + message.content + ', \"call_id\": \"' }}"
    "{{- message.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{%- endif %}{%- endfor %}"
)
"""As Mistral 7B v0.3: no generation prompt, tools and system prompt at the last question, ids of nine letters."""

DEEPSEEK = (
    "{{- bos_token }}{%- for message in messages %}{%- if message.role == 'user' %}{{- '<|user|>' + message.content }}"
    "{%- elif message.role == 'assistant' and message.content is none %}{{- '<|assistant|>' }}"
    "{%- for call in message.tool_calls %}{{- '<tool_call>' + call['type'] + '\\n' + call['function']['name'] }}"
    "{{- '\\n```json\\n' + call['function']['arguments'] + '\\n```' }}{%- endfor %}{{- eos_token }}"
    "{%- elif message.role == 'assistant' %}{%- set content = message.content %}"
    "{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}"
    "{{- '<|assistant|>' + content + eos_token }}"
    "{%- elif message.role == 'tool' %}{{- '<|end|>' + message.content }}"
    "{%- else %}{{- message.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
"""As DeepSeek V3 and R1: arguments as a text, no content where a turn calls, reasoning in the text left out."""

CHANNELS = (
    "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{%- if message.thinking %}{{- '<|start_of_role|>assistant<|user|>analysis<|end_of_role|>' + message.thinking + '<|end|>' }}"
    "{%- endif %}{{- '<|start_of_role|>assistant<|user|>final<|end_of_role|>' + message.content + '<|end|>' }}"
    "{%- else %}{{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end|>' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant' }}{%- endif %}"
)
"""As gpt-oss: reasoning in a message of its own, before the final one."""

MARKED = (
    "{%- for message in messages %}{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}"
    "{% generation %}{%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>\\n' }}"
    "{%- endif %}{{- message.content }}{%- for call in message.tool_calls or [] %}"
    "{{- '\\n<tool_call>' + call.function | tojson + '</tool_call>' }}{%- endfor %}{{- '<|im_end|>' }}"
    "{% endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""Answers in a generation block, for transformers' own mask."""

TOOL_TEMPLATES = {
    "hermes": HERMES,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "deepseek": DEEPSEEK,
    "channels": CHANNELS,
    "marked": MARKED,
}
