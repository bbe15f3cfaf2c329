// What a reader of the open page would see, and could not; the answer is `browser.Page`.
(() => {
  if (!matchMedia("print").matches) document.querySelectorAll("details").forEach(each => each.open = true);

  const visible = e => e.checkVisibility({ contentVisibilityAuto: true });
  const name = e => `${e.tagName}.${e.getAttribute("class") ?? ""}: ${e.textContent.trim().slice(0, 40)}`;
  const names = list => [...new Set(list.map(name))];
  const all = [...document.querySelectorAll("body *")].filter(visible);
  const written = all.filter(e => [...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.data.trim()));

  const scrolls = e => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  const inScroller = e => e.parentElement && (scrolls(e.parentElement) || inScroller(e.parentElement));
  const room = document.documentElement.clientWidth;
  const words = new Range(); // text may reach out of the box of its own element
  const boxes = e => {
    words.selectNodeContents(e);
    return [e, ...(written.includes(e) && !scrolls(e) ? [words] : [])].map(each => each.getBoundingClientRect());
  };
  const reachesOut = e => boxes(e).some(box => box.right > room + 1 || box.left < -1);
  const wide = all.filter(e => !inScroller(e) && reachesOut(e));

  // Contrast as WCAG 2.2 has it, 1.4.3.
  const numbers = text => text.match(/[\d.]+/g).map(Number);
  const linear = c => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = e => {
    for (let p = e; p; p = p.parentElement) {
      const colour = numbers(getComputedStyle(p).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const faint = written.filter(e => {
    const style = getComputedStyle(e);
    const [dark, bright] = [numbers(e instanceof SVGElement ? style.fill : style.color), behind(e)]
      .map(light).sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05) < 4.5;
  });

  const small = written.filter(e => {
    const svg = e.closest("svg");
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    return parseFloat(getComputedStyle(e).fontSize) * scale < 7.5;
  });

  const images = [...document.images];
  return {
    width: document.documentElement.scrollWidth,
    text: document.body.innerText,
    headings: all.filter(e => ["H1", "H2", "H3"].includes(e.tagName)).map(e => e.textContent.trim()),
    images: images.length,
    broken: images.filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.alt),
    wide: names(wide),
    scrolling: names(all.filter(e => scrolls(e) && e.scrollWidth > e.clientWidth + 1)),
    faint: names(faint),
    small: names(small),
  };
})()
