"""The page's template."""

__all__ = ["TEMPLATE"]

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mamba_probe: the claims, reproduced</title>
<style>
  :root { --ink: #1a1a1a; --soft: #5c5c5c; --line: #dcdcdc; --blue: #0072B2; --paper: #f4efe6; --red: #b00020; }
  body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); max-width: 66rem;
         margin: 2.5rem auto; padding: 0 1.2rem; }
  h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.35rem; margin: 3rem 0 .6rem; }
  h3 { font-size: 1rem; margin: 0 0 .3rem; } h4 { font-size: .95rem; margin: 1.4rem 0 .1rem; }
  .subject, figcaption, .shared, .notes, .limits { color: var(--soft); }
  .paper { background: var(--paper); border: 1px solid #e2d9c6; border-radius: .4rem; padding: .8rem 1.1rem;
           margin: 0 0 1rem; }
  .paper h3 { text-transform: uppercase; letter-spacing: .06em; font-size: .78rem; color: #7a6a45; }
  .paper blockquote { margin: 0; font-style: italic; }
  .ours { border-left: 4px solid var(--blue); padding: .1rem 0 .1rem 1.1rem; }
  .ours > h3 { text-transform: uppercase; letter-spacing: .06em; font-size: .78rem; color: var(--blue); }
  .scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .84rem; margin: .5rem 0; }
  th, td { text-align: left; padding: .22rem .9rem .22rem 0; border-bottom: 1px solid var(--line);
           white-space: nowrap; }
  td { font-variant-numeric: tabular-nums; } th { font-weight: 600; }
  figure { margin: 1rem 0; } img { width: 100%; height: auto; }
  figcaption, .shared, .notes, .limits, dl { font-size: .86rem; } code { font-size: .85em; overflow-wrap: anywhere; }
  .notes { margin: 0; padding: 0; list-style: none; } details { margin: .8rem 0; }
  summary { cursor: pointer; color: var(--blue); }
  .must { color: var(--soft); } .fails { color: white; background: var(--red); padding: 0 .4rem; font-weight: 700; }
  .provenance td { white-space: normal; }
</style>
</head>
<body>
<header>
  <h1>The claims, reproduced</h1>
  <p class="subject">{{ said }}. "Fails as it must" is a measurement that theory wants to fail, and that does.</p>
</header>
<ul>
{% for section in sections %}
  <li><a href="#{{ section.claim.name }}">{{ section.claim.title }}</a>: {{ section.said }}
  {% if section.failed %}<span class="fails">{{ section.failed }} FAILS</span>{% endif %}</li>
{% endfor %}
</ul>
{% for section in sections %}
<section id="{{ section.claim.name }}">
  <h2>{{ section.claim.title }}</h2>
  <div class="paper">
    <h3>What the paper claims</h3>
    {% if section.claim.paper %}
    <blockquote>{{ section.claim.paper }}</blockquote>
    <p class="subject">The abstract of {{ paper }}, condensed. Nothing else here is attributed to it.</p>
    {% else %}
    <p>Nothing: the abstract of {{ paper }} makes no such claim. This section is ours alone.</p>
    {% endif %}
  </div>
  <div class="ours">
    <h3>What we constructed and measured (ours)</h3>
    <p>{{ section.claim.ours }}</p>
    <p><b>{{ section.said }}.</b></p>
    {% if section.says %}
    <ul>{% for each in section.says %}<li>{{ each }}</li>{% endfor %}</ul>
    {% endif %}
    <figure>
      <img src="{{ section.png }}" alt="{{ section.claim.title }}: {{ section.claim.caption }}">
      <figcaption>
        {{ section.claim.caption }}
        For a paper: {{ section.claim.name }}.svg. All columns: {{ section.claim.name }}.csv.
      </figcaption>
    </figure>
    {% if section.left_out %}
    <ul class="limits">{% for each in section.left_out %}<li>{{ each }}</li>{% endfor %}</ul>
    {% endif %}
    {% for table in section.tables %}
    <details{{ " open" if loop.first else "" }}>
      <summary>{{ table.heading }} ({{ table.cells | length }} rows)</summary>
      <p class="shared">
        {% for name, said in table.shared %}
        <b>{{ name }}</b> {{ said }}{{ "" if loop.last else ";" }}
        {% endfor %}
      </p>
      <div class="scroll"><table>
        <thead><tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
        <tbody>
        {% for line in table.cells %}
          <tr>{% for cell in line %}<td><span class="{{ marks.get(cell, "") }}">{{ cell }}</span></td>{% endfor %}</tr>
        {% endfor %}
        </tbody>
      </table></div>
      <ul class="notes">
        {% for letter, said in table.notes %}
        <li><b>{{ letter }}</b> {{ said }}</li>
        {% endfor %}
      </ul>
    </details>
    {% endfor %}
  </div>
</section>
{% endfor %}
<section id="provenance">
  <h2>Provenance</h2>
  <table class="provenance"><tbody>
    {% for name, value in provenance %}
    <tr><th>{{ name }}</th><td><code>{{ value }}</code></td></tr>
    {% endfor %}
  </tbody></table>
  <p class="subject">Constructions, bounds and estimators are ours. Of the paper its abstract alone was used.</p>
</section>
</body>
</html>
"""
