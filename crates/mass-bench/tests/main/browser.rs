//! report.html in a real browser, Debian's `chromium`: as wide as a telephone and as a screen, nothing is cut, all is large enough
//! to be read, and nothing is asked of a network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mass_bench::report::join;
use serde_json::Value;

const WIDTHS: [u32; 3] = [360, 390, 1200];

/// What a page of such a width says of itself. A window cannot be as narrow as a telephone: pages are frames of one.
const PROBE: &str = r#"<script>
const problems = [];
addEventListener('error', e => problems.push(e.message || 'asks for ' + e.target.src), true);
addEventListener('securitypolicyviolation', e => problems.push('asks for ' + e.blockedURI));
addEventListener('load', () => {
  const all = q => Array.from(document.querySelectorAll(q));
  const wide = document.documentElement.scrollWidth;
  if (wide > innerWidth) problems.push(`is ${wide} wide`);
  for (const d of all('details')) d.open = true;
  const opened = document.documentElement.scrollWidth;
  if (opened > innerWidth) problems.push(`is ${opened} wide with all details`);
  for (const r of performance.getEntriesByType('resource')) problems.push('asks for ' + r.name);
  const name = e => e.textContent.trim().slice(0, 40);
  const texts = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || e.closest('title, script')) continue;
    texts.push(e);
    const scale = e.ownerSVGElement ? e.getScreenCTM().a : 1;
    const size = parseFloat(getComputedStyle(e).fontSize) * scale;
    if (size < 11) problems.push(`${size.toFixed(1)} px: ${name(e)}`);
    const box = e.getBoundingClientRect();
    if (!e.closest('.scroll') && box.right > innerWidth + .5) problems.push(`is cut at ${innerWidth}: ${name(e)}`);
  }
  for (const svg of all('.plot svg')) {
    const frame = svg.getBoundingClientRect();
    const boxes = Array.from(svg.querySelectorAll('text'), t => [t, t.getBoundingClientRect()]);
    for (const [i, [t, a]] of boxes.entries()) {
      if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.bottom > frame.bottom + 1)
        problems.push(`leaves ${svg.ariaLabel}: ${name(t)}`);
      const [dx, dy] = [a.height / 12, a.height / 2];
      for (const [u, b] of boxes.slice(i + 1))
        if (a.left < b.right - dx && b.left < a.right - dx && a.top < b.bottom - dy && b.top < a.bottom - dy)
          problems.push(`${name(t)} lies on ${name(u)} in ${svg.ariaLabel}`);
    }
    for (const m of svg.querySelectorAll('.mark, .line, .ring')) {
      const box = m.getBoundingClientRect();
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        problems.push(`a mark leaves ${svg.ariaLabel}`);
    }
  }
  const figures = all('figure').length, tables = all('table').length;
  window.found = { width: innerWidth, texts: texts.length, figures, tables, problems };
});
</script>"#;

/// What each page says, in one window.
fn looked_at(pages: &[PathBuf], dir: &Path) -> Vec<Value> {
    let mut frames = String::new();
    for page in pages {
        let html = fs::read_to_string(page).unwrap();
        let html = html.replacen("<head>", &format!("<head>{PROBE}"), 1);
        let html = html.replace('&', "&amp;").replace('"', "&quot;");
        for width in WIDTHS {
            frames += &format!(
                "<iframe width=\"{width}\" height=\"800\" style=\"border:0\" srcdoc=\"{html}\"></iframe>\n"
            );
        }
    }
    let count = pages.len() * WIDTHS.len();
    let window = dir.join("window.html");
    // Its own load comes after that of every frame, and the browser writes the page out after that.
    let text = format!(
        "<!doctype html><body>{frames}<pre id=\"found\"></pre><script>\n\
         addEventListener('load', () => {{ for (const [i, f] of document.querySelectorAll('iframe').entries())\n\
         found.textContent += JSON.stringify({{...f.contentWindow.found, page: Math.floor(i / {})}}) + '\\n'; }});\n</script>",
        WIDTHS.len()
    );
    fs::write(&window, text).unwrap();
    let output = Command::new("chromium")
        .args([
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=1300,900",
            "--enable-logging=stderr",
        ])
        .arg("--dump-dom")
        .arg(format!("--user-data-dir={}", dir.join("profile").display()))
        .arg(format!("file://{}", window.display()))
        .output()
        .expect("Debian's package chromium");
    let said = String::from_utf8_lossy(&output.stderr);
    let console: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("CONSOLE"))
        .collect();
    assert!(console.is_empty(), "{console:?}");
    let dom = String::from_utf8_lossy(&output.stdout);
    let found = dom.split("<pre id=\"found\">").nth(1).unwrap_or_default();
    let found = found.split("</pre>").next().unwrap_or_default();
    let unescaped = found
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&");
    let found: Vec<Value> = unescaped
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(found.len(), count, "{said}");
    found
}

#[test]
fn reports_are_read_on_a_telephone_as_on_a_wide_screen() {
    let published = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/results");
    let dir = tempfile::tempdir().unwrap();
    let mut pages = Vec::new();
    for entry in fs::read_dir(&published).unwrap() {
        let from = entry.unwrap().path();
        if from.join("results.json").is_file() {
            let out = dir.path().join(from.file_name().unwrap());
            join(&[from], Some(&out)).unwrap();
            pages.push(out.join("report.html"));
        }
    }
    pages.push(crate::report::report_with_everything(dir.path()));
    assert!(pages.len() > 5, "{pages:?}");
    for found in looked_at(&pages, dir.path()) {
        let page = &pages[found["page"].as_u64().unwrap() as usize];
        assert_eq!(
            found["problems"],
            Value::Array(Vec::new()),
            "{} at {}",
            page.display(),
            found["width"]
        );
        assert!(WIDTHS.iter().any(|w| found["width"] == *w), "{found}");
        assert!(
            found["texts"].as_u64() > Some(100) && found["figures"].as_u64() > Some(2),
            "{found}"
        );
    }
}

/// The test can fail: what it looks for is seen.
#[test]
fn what_is_wrong_with_a_page_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let page = dir.path().join("bad.html");
    let wrong = "<!doctype html><html><head></head><body><p style=\"width:2000px;font-size:9px\">small</p>\
        <div class=\"plot\"><svg viewBox=\"0 0 1000 10\" width=\"100\" aria-label=\"chart\"><text x=\"990\" y=\"9\">tiny</text>\
        <text x=\"990\" y=\"9\">on it</text></svg></div><img src=\"nothing.png\"></body></html>";
    fs::write(&page, wrong).unwrap();
    for found in looked_at(&[page], dir.path()) {
        let problems = found["problems"].to_string();
        for part in [
            "wide",
            "9.0 px: small",
            "px: tiny",
            "lies on",
            "leaves chart",
            "nothing.png",
        ] {
            assert!(problems.contains(part), "no `{part}` in {problems}");
        }
    }
}
