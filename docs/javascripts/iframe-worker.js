// A page that is a file may start no worker, and search runs in one: there it runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.early = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.documentElement.append(frame);
      const inner = (this.inner = frame.contentWindow);
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      inner.importScripts = (...urls) =>
        urls.reduce((before, next) => before.then(() => new Promise((done) => this.load(next, done))), Promise.resolve());
      this.load(url, () => {
        const waiting = this.early;
        this.early = null;
        waiting.forEach((data) => this.postMessage(data));
      });
    }
    load(url, done) {
      const script = this.inner.document.createElement("script");
      script.src = url;
      script.onload = done;
      this.inner.document.head.append(script);
    }
    postMessage(data) {
      if (this.early) this.early.push(data);
      else this.inner.dispatchEvent(new MessageEvent("message", { data }));
    }
    terminate() {}
  };
}
