"use strict";
// A browser that loads the page in advance must not use up its link.
const enter = () => document.querySelector("form").requestSubmit();
if (document.prerendering) document.addEventListener("prerenderingchange", enter, { once: true });
else enter();
