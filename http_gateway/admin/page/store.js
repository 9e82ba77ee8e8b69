/* The conversations, kept by the browser (IndexedDB): bounded, the one that was not used for longest goes first. Where
   the browser keeps nothing, they last as long as the page. */

import { checkedConversation } from "./conversation.js";
import { newId } from "./dom.js";

const DATABASE = "quartet";
const TABLE = "conversations";
export const MOST_CONVERSATIONS = 200;
const MOST_CHARACTERS = 32_000_000; // of all together, as JSON
const LARGEST = 4_000_000; // of one
const FORMAT = "quartet-conversations-1"; // of exported files

export class Store {
  constructor() {
    this.all = new Map(); // id → conversation
    this.sizes = new Map(); // id → characters
    this.leaving = new Set(); // ids that the browser is deleting
    this.lasting = false; // the browser keeps them
  }

  /* Read what the browser has kept, again where other tabs have changed it. What is no conversation (any more) is left
     alone and not shown. */
  async open() {
    try {
      this.database ||= await opened();
      const found = await done(this.database.transaction(TABLE).objectStore(TABLE).getAll());
      this.lasting = true;
      this.all.clear();
      this.sizes.clear();
      for (const kept of found) this.#take(kept);
    } catch {
      this.lasting = false;
    }
  }

  #take(kept) {
    try {
      const conversation = checkedConversation(kept);
      this.all.set(conversation.id, conversation);
      this.sizes.set(conversation.id, JSON.stringify(conversation).length);
    } catch {
      /* written by another version of this page */
    }
  }

  /* Latest first. */
  list() {
    return [...this.all.values()].sort((one, other) => other.updated - one.updated);
  }

  get(id) {
    return this.all.get(id) || null;
  }

  /* Keep a conversation as it is now. Logprobs are left out where it has become very large. */
  async save(conversation) {
    let kept = conversation;
    let size = JSON.stringify(kept).length;
    if (size > LARGEST) {
      kept = withoutTokens(conversation);
      size = JSON.stringify(kept).length;
    }
    this.all.set(conversation.id, conversation);
    this.sizes.set(conversation.id, size);
    this.leaving.delete(conversation.id);
    await this.#write((table) => table.put(kept));
    await this.#makeRoom(conversation.id);
  }

  /* It is listed until the browser has deleted it, so that nobody takes it for gone before; it stays if it is saved
     meanwhile. */
  async remove(id) {
    this.leaving.add(id);
    await this.#write((table) => table.delete(id));
    if (!this.leaving.delete(id)) return;
    this.all.delete(id);
    this.sizes.delete(id);
  }

  async #makeRoom(keep) {
    const oldest = this.list()
      .reverse()
      .filter((conversation) => conversation.id !== keep);
    while (oldest.length && this.#isOverfull()) await this.remove(oldest.shift().id);
  }

  #isOverfull() {
    const total = [...this.sizes.values()].reduce((sum, size) => sum + size, 0);
    return this.all.size > MOST_CONVERSATIONS || total > MOST_CHARACTERS;
  }

  async #write(change) {
    if (!this.lasting) return;
    try {
      const transaction = this.database.transaction(TABLE, "readwrite");
      change(transaction.objectStore(TABLE));
      await committed(transaction);
    } catch {
      this.lasting = false; // the disk is full, or the browser has changed its mind
    }
  }

  /* All conversations as the text of a file. */
  exported() {
    return JSON.stringify({ format: FORMAT, conversations: this.list() }, null, 1);
  }

  /* Add the conversations of such a file; how many that were. One that is here already, as it is, is not added again;
     one that has changed on either side becomes another beside it. Throws where it is no such file, and has added
     nothing. */
  async add(text) {
    const said = JSON.parse(text);
    if (said?.format !== FORMAT || !Array.isArray(said.conversations))
      throw new Error("This is no file of conversations.");
    const found = said.conversations.map(checkedConversation).filter((one) => !this.#has(one));
    const room = MOST_CONVERSATIONS - this.all.size;
    if (found.length > room) throw new Error(`There is room for ${room} more conversations; delete some first.`);
    for (const conversation of found.reverse()) {
      const id = this.all.has(conversation.id) ? newId() : conversation.id;
      await this.save({ ...conversation, id });
    }
    return found.length;
  }

  #has(conversation) {
    const kept = this.all.get(conversation.id);
    return Boolean(kept) && JSON.stringify(checkedConversation(kept)) === JSON.stringify(conversation);
  }
}

function withoutTokens(conversation) {
  const messages = conversation.messages.map((message) =>
    message.versions
      ? { ...message, versions: message.versions.map((answer) => ({ ...answer, tokens: [] })) }
      : message,
  );
  return { ...conversation, messages };
}

function opened() {
  const request = indexedDB.open(DATABASE, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
  return done(request);
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked"));
  });
}

/* A page that is left when its request has succeeded, but not yet its transaction, loses what it has written. */
function committed(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error);
  });
}
